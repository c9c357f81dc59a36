"""Command line: ``milora-vl VERB`` or ``python -m milora_vl VERB``, one function a verb."""

import argparse
import logging
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from milora_vl.config import Config, load_config
from milora_vl.errors import StoppedError, explain_error

INTERRUPTED = 130  # as shells report SIGINT and SIGTERM
STOPPED = 143
OVERRIDES_HELP = "section.key=value, for example training.max_steps=10 adapter.r=64"


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG, overrides and --run-folder."""
    parser.add_argument("config", type=Path, help="YAML file; shipped ones are in configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=OVERRIDES_HELP)
    text = "run folder (default: run_folder of the config)"
    # --run alone is taken for torchrun's --run-path when torchrun starts the package
    parser.add_argument("--run-folder", "--run", dest="run", type=Path, metavar="DIR", help=text)


def read_config(arguments: argparse.Namespace) -> tuple[Config, Path]:
    """Read the config with its overrides and the run folder."""
    config = load_config(arguments.config, arguments.overrides)
    return config, arguments.run or Path(config.run_folder)


def train(arguments: argparse.Namespace) -> int:
    """Finetune: stage 1 if the config has one, evaluation before and after, report.

    A config with ``compare`` trains each of its entries and writes one page that compares them.
    """
    from milora_vl.eval.report import print_comparison
    from milora_vl.pipeline import run_comparison, run_pipeline
    from milora_vl.runtime import is_main_process, peak_memory_gib, use_one_device

    config, folder = read_config(arguments)
    use_one_device(f"accelerate launch -m milora_vl train {arguments.config}")
    if config.compare:
        page = run_comparison(config, folder)
        if is_main_process():
            print(f"page: {page}")
        return 0
    results = run_pipeline(config, folder)
    if not is_main_process():
        return 0
    if results["after"]:
        print_comparison(results["before"], results["after"])
    print(f"base:    {results['base']}")
    print(f"adapter: {folder / 'adapter'}")
    print(f"report:  {folder / 'report.html'}")
    print(f"peak memory of this process: {peak_memory_gib():.1f} GiB")
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    """Pass on to ``python -m milora_vl.eval``."""
    from milora_vl.eval.__main__ import main as eval_main

    return eval_main(arguments.rest) or 0


def ask(arguments: argparse.Namespace) -> int:
    """Answer one question about one image or video."""
    from milora_vl import inference
    from milora_vl.runtime import prefer_faster_weights_

    settings = (arguments.adapter, arguments.device, arguments.quantization)
    vlm = inference.load_for_inference(arguments.model, *settings)
    prefer_faster_weights_(vlm.model)
    limits = (arguments.max_new_tokens, arguments.video_frames)
    print(inference.ask(vlm, arguments.image, arguments.question, *limits))
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Export the adapter of a run, check it against the live model, write a model card beside it.

    --form lora: the plain PEFT LoRA of rank 2r for the original base. --form lora-small: a plain
    LoRA of rank --rank that is as near to it as possible; what is cut off is printed and written
    layer by layer to truncation.json. --form merged: a transformers checkpoint with its processor.
    --form serve: what vLLM, SGLang and llama.cpp take unmerged: base/, the base with the trained
    projector, and lora/, a LoRA without it; how each is started is printed.
    --form gguf: merged, as model.gguf and mmproj.gguf for llama.cpp.

    An adapter trained on a 4-bit base (NF4) can be merged onto two things. --merge-onto original
    takes the full-precision weights: nothing of the base is lost, yet the adapter was trained
    beside weights that differ from these by the quantization error, so the merged model is not
    quite the one that was trained. --merge-onto dequantized takes the values that the 4-bit codes
    stand for: the merged model computes what was trained, quantization error included.
    """
    import torch

    from milora_vl.data.images import load_image
    from milora_vl.export.forms import export_adapter

    dtype = "auto" if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    exported = export_adapter(
        arguments.source,
        arguments.out,
        arguments.form,
        base=arguments.model,
        r=arguments.rank,
        merge_onto=arguments.merge_onto,
        device=arguments.device,
        dtype=dtype,
        picture=load_image(arguments.image) if arguments.image else None,
        question=arguments.question,
        strength=arguments.strength,
    )
    for line in (*exported.notes, *exported.checks, *exported.commands):
        print(line)
    print(f"export: {exported.folder}")
    return 0


def init(arguments: argparse.Namespace) -> int:
    """Write what another trainer needs to train MiLoRA: an adapter folder and its base.

    --target residual: DIR/base is the checkpoint with W_p, DIR/adapter the LoRA with (A0, B0). Any
    trainer that goes on from a PEFT adapter takes them. W_p is rounded to the dtype of the
    checkpoint; what that loses is printed, and --dtype float32 loses nothing.
    --target lora: the original base, DIR/adapter, and DIR/anchor as a second, frozen adapter. Exact
    in every dtype, for trainers to which you hand the model.

    Settings are those of a config's adapter section. Afterwards: milora-vl finish. How TRL,
    LLaMA-Factory, ms-swift, axolotl and unsloth take them: docs/train_elsewhere.md.

    Example: milora-vl init --model llava-hf/llava-1.5-7b-hf --out start adapter.r=64
    """
    import torch

    from milora_vl.config import adapter_config
    from milora_vl.export.elsewhere import init_start

    config = adapter_config(arguments.overrides, {"train_projector": False})
    start = init_start(
        arguments.model,
        arguments.out,
        config,
        target=arguments.target,
        device=arguments.device,
        dtype="auto" if arguments.dtype == "auto" else getattr(torch, arguments.dtype),
    )
    print(start.certificate.summary())
    for line in start.checks:
        print(f"step 0: {line}")
    print(f"base model:   {start.base}")
    print(f"train on from {start.folder / 'adapter'}")
    if arguments.target == "lora":
        print(f"frozen:       {start.folder / 'anchor'}")
    print(f"then:         milora-vl finish {arguments.out} --adapter TRAINED --out OUT")
    return 0


def finish(arguments: argparse.Namespace) -> int:
    """Turn what another trainer made of a start into a portable adapter for the original base.

    The result is a plain PEFT LoRA of twice the rank, checked against the trained model. The base
    is checked by the fingerprint of its weights.

    Example: milora-vl finish start --adapter outputs/checkpoint-500 --out adapter
    """
    from milora_vl.export.elsewhere import finish_adapter

    finished = finish_adapter(
        arguments.folder,
        arguments.adapter,
        arguments.out,
        base=arguments.model,
        device=arguments.device,
    )
    for line in finished.checks:
        print(line)
    print(f"adapter: {finished.folder}")
    return 0


def dial(arguments: argparse.Namespace) -> int:
    """Evaluate a trained model at several strengths of its update: gain against what is kept.

    The model is loaded once. Strength 0 is the base, 1 what was trained; smaller updates forget
    less. Benches, their files and limits are those of the run unless given here. What is kept is
    measured by the loss on fixed texts, and by the benches named with --retention. OUT holds
    dial.html, dial.json and an evaluation folder for each strength.

    Example: milora-vl dial runs/a --strengths 0,0.5,1 --bench mmbench,pope --retention pope
    """
    from milora_vl.eval.dial import turn_dial

    out = arguments.out or arguments.run_folder / "dial"
    result = turn_dial(
        arguments.run_folder,
        out,
        strengths=arguments.strengths,
        benches=arguments.bench,
        retention=arguments.retention,
        data_dir=arguments.data,
        limit=arguments.limit,
        base=arguments.model,
        device=arguments.device,
    )
    for row in result["strengths"]:
        scores = [f"{name} {entry['score']:.4g}" for name, entry in row["benches"].items()
                  if entry["score"] is not None]  # fmt: skip
        ratio = row["text"] and f"text perplexity x {row['text']['text_perplexity_ratio']:.4f}"
        print(
            f"strength {row['strength']:g}: {', '.join([*scores, ratio or 'texts not measured'])}"
        )
    print(f"page: {out / 'dial.html'}")
    return 0


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers, as 0,0.5,1") from None


def serve(arguments: argparse.Namespace) -> int:
    """Serve a base and its adapters by name, with the API of OpenAI's chat completions.

    /v1/chat/completions takes text and images (data: URLs) and streams; /v1/models lists the base
    and the adapters, and each request says by "model" which of them answers. One base is in memory,
    however many adapters there are.
    """
    import torch

    from milora_vl.errors import MiloraError
    from milora_vl.runtime import prefer_faster_weights_
    from milora_vl.serve.engine import Engine
    from milora_vl.serve.models import load_served

    try:
        from milora_vl.serve.app import Limits, create_app, warn_of_exposure
        from milora_vl.serve.app import serve as run_server
    except ImportError as error:
        raise MiloraError(f"{error.name} is missing: pip install 'milora-vl[serve]'") from error
    models = load_served(
        arguments.model,
        read_named(arguments.adapter),
        device=arguments.device,
        dtype="auto" if arguments.dtype == "auto" else getattr(torch, arguments.dtype),
        quantization=arguments.quantization,
    )
    prefer_faster_weights_(models[0].vlm.model)
    limits = Limits(
        max_tokens=arguments.max_tokens,
        timeout_s=arguments.timeout,
        max_body_bytes=arguments.max_body_mib << 20,
        allowed_hosts=tuple(arguments.allow_http),
    )
    api_key = arguments.api_key or os.environ.get("MILORA_API_KEY") or None
    names = [one.name for one in models]
    if warning := warn_of_exposure(arguments.host, api_key, names):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"models: {', '.join(names)}; base URL: http://{arguments.host}:{arguments.port}/v1")
    engine = Engine(batch_size=arguments.batch_size, max_requests=arguments.queue)
    run_server(create_app(models, engine, limits, api_key), arguments.host, arguments.port)
    return 0


def read_named(words: list[str]) -> dict[str, Path]:
    """Return folder by name of NAME=DIR words; a DIR alone is named after its run.

    Raises:
        ValueError: If two have one name.
    """
    found: dict[str, Path] = {}
    for word in words:
        name, separator, path = word.partition("=")
        folder = Path(path if separator else word)
        if not separator:
            name = folder.parent.name if folder.name in ("adapter", "lora") else folder.name
        if name in found or not name:
            raise ValueError(f"--adapter {word}: a name of its own is needed (NAME=DIR)")
        found[name] = folder
    return found


def plan(arguments: argparse.Namespace) -> int:
    """Say what a run would adapt, train, take and need, before any weight is read."""
    from milora_vl.forecast import describe_work
    from milora_vl.pipeline import count_work
    from milora_vl.plan import plan_run

    config, _ = read_config(arguments)
    print(plan_run(config, arguments.device).summary())
    print(describe_work(count_work(config), arguments.gflops))
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Compare runs: scores with paired tests, training, memory, images where they disagree."""
    from milora_vl.eval.comparison import compare_runs

    compare_runs(arguments.runs, arguments.out)
    print(f"page: {arguments.out}")
    return 0


def convert_llava(arguments: argparse.Namespace) -> int:
    """Turn an original LLaVA-1.5 checkpoint into a plain transformers one."""
    from milora_vl.model.convert_llava import convert_llava as convert
    from milora_vl.model.convert_llava import fetch_original

    out = convert(
        fetch_original(arguments.source),
        arguments.out,
        base=arguments.base,
        vision=arguments.vision,
        dtype=arguments.dtype,
    )
    print(f"checkpoint: {out}")
    return 0


def compose(arguments: argparse.Namespace) -> int:
    """Join a vision tower and a language model into a LLaVA checkpoint with a new projector."""
    from milora_vl.model.compose import compose_from_names

    parts = (arguments.vision, arguments.language, arguments.out)
    out = compose_from_names(
        *parts,
        projector=arguments.projector,
        image_size_px=arguments.image_size,
        vision_feature_layer=arguments.feature_layer,
        dtype=arguments.dtype,
        allow_pickle=arguments.allow_pickle,
        seed=arguments.seed,
    )
    print(f"checkpoint: {out}; next: configs/compose_pretrain.yaml with model.path={out}")
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Check a config and print it with everything filled in."""
    from milora_vl.config import variants
    from milora_vl.pipeline import check_adapter, check_names

    config, _ = read_config(arguments)
    for one in variants(config).values() if config.compare else [config]:
        check_names(one)
        check_adapter(one.model, one.adapter, only_here=True)
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    return 0


def add_export_arguments(verb: argparse.ArgumentParser) -> None:
    """Add what ``export`` needs to know."""
    verb.add_argument("source", help="run, checkpoint or adapter folder, or an adapter's hub id")
    verb.add_argument("--model", help="original base: hub id or folder (default: as recorded)")
    verb.add_argument("--out", type=Path, required=True, help="folder of the export")
    verb.add_argument(
        "--form", choices=["lora", "lora-small", "merged", "serve", "gguf"], default="lora"
    )
    verb.add_argument("--rank", type=int, help="rank of lora-small or serve")
    verb.add_argument(
        "--merge-onto",
        type=lambda text: text.replace("dequantised", "dequantized"),
        choices=["original", "dequantized"],
        help="for an adapter of a 4-bit base",
    )
    verb.add_argument("--device", default="cpu")
    verb.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    verb.add_argument("--image", type=Path, help="image for the check (default: from the run)")
    verb.add_argument("--question", help="question for the check")
    verb.add_argument(
        "--strength",
        type=float,
        default=1.0,
        help="of what training added: 0 is the base, 1 (default) the trained model",
    )
    verb.set_defaults(run_verb=export)


def add_start_verbs(verbs: Any) -> None:
    """Add ``init`` and ``finish``, between which another trainer trains."""
    verb = verbs.add_parser(
        "init",
        help="make a start that any trainer can train",
        description=init.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("overrides", nargs="*", metavar="adapter.key=value", help=OVERRIDES_HELP)
    verb.add_argument("--model", required=True, help="base: hub id or folder")
    verb.add_argument("--out", type=Path, required=True, help="new folder")
    verb.add_argument("--target", choices=["residual", "lora"], default="residual")
    verb.add_argument("--device", default="cpu")
    verb.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    verb.set_defaults(run_verb=init)
    verb = verbs.add_parser(
        "finish",
        help="make a portable adapter of what another trainer trained",
        description=finish.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("folder", type=Path, help="folder of milora-vl init")
    verb.add_argument("--adapter", type=Path, required=True, help="what the trainer saved")
    verb.add_argument("--out", type=Path, required=True, help="folder of the portable adapter")
    verb.add_argument("--model", help="original base (default: as recorded)")
    verb.add_argument("--device", default="cpu")
    verb.set_defaults(run_verb=finish)


def add_dial_verb(verbs: Any) -> None:
    """Add ``dial``."""
    verb = verbs.add_parser(
        "dial",
        help="evaluate at several strengths of the update",
        description=dial.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("run_folder", type=Path, metavar="RUN", help="run or adapter folder")
    verb.add_argument("--strengths", type=_numbers, default=[0.0, 0.25, 0.5, 0.75, 1.0],
                      help="numbers with commas (default: 0,0.25,0.5,0.75,1)")  # fmt: skip
    verb.add_argument("--bench", help="names with commas (default: those of the run)")
    verb.add_argument("--retention", type=lambda text: text.split(","), default=[],
                      help="which of the benches stand for what is to be kept")  # fmt: skip
    verb.add_argument("--data", type=Path, help="folder of the benches' files")
    verb.add_argument("--limit", type=int, help="most questions of a bench")
    verb.add_argument("--out", type=Path, help="folder of the results (default: RUN/dial)")
    verb.add_argument("--model", help="original base (default: as recorded)")
    verb.add_argument("--device", default="auto")
    verb.set_defaults(run_verb=dial)


def cache(arguments: argparse.Namespace) -> int:
    """Show or clear the SVD factors that are kept for the next start."""
    from milora_vl.adapter.factor_cache import FactorCache, factors_folder

    factors = FactorCache(factors_folder())
    if arguments.action == "clear":
        print(f"{factors.folder}: freed {factors.clear() / 2**20:.1f} MiB")
        return 0
    entries = [facts for _, facts in factors.entries()]
    total = sum(facts["bytes"] for facts in entries)
    print(f"{factors.folder}: {len(entries)} layers, {total / 2**20:.1f} MiB")
    kinds = Counter((x["slice"], x["rank"], "x".join(map(str, x["shape"]))) for x in entries)
    for (part, rank, shape), count in sorted(kinds.items()):
        print(f"  {count:>5} of {shape:<13} {part}, r={rank}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all verbs."""
    parser = argparse.ArgumentParser(prog="milora-vl", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser(
        "train", help="finetune a model as a config says", description=train.__doc__
    )
    add_config_arguments(verb)
    verb.set_defaults(run_verb=train)
    verb = verbs.add_parser("check", help="check a config and print it", description=check.__doc__)
    add_config_arguments(verb)
    verb.set_defaults(run_verb=check)
    verb = verbs.add_parser(
        "plan", help="what a config would adapt and need, without weights", description=plan.__doc__
    )
    add_config_arguments(verb)
    verb.add_argument(
        "--device",
        metavar="GPUS",
        help="where it will run, for example 1x24GB, 8x80GB or 4xL40S; nothing is timed here then",
    )
    verb.add_argument(
        "--gflops",
        type=float,
        metavar="RATE",
        help="also say how long every stage takes where the products of a run reach this rate",
    )
    verb.set_defaults(run_verb=plan)
    add_export_arguments(
        verbs.add_parser(
            "export",
            help="LoRA, merged model or what servers take, checked",
            description=export.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    add_start_verbs(verbs)
    add_dial_verb(verbs)
    verb = verbs.add_parser("cache", help="SVD factors on disk", description=cache.__doc__)
    verb.add_argument("action", choices=["show", "clear"])
    verb.set_defaults(run_verb=cache)
    verb = verbs.add_parser("eval", help="evaluate (see milora-vl eval --help)", add_help=False)
    verb.add_argument("rest", nargs=argparse.REMAINDER)
    verb.set_defaults(run_verb=evaluate)
    verb = verbs.add_parser("compare", help="compare runs", description=compare.__doc__)
    verb.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run or evaluation folder")
    verb.add_argument("--out", type=Path, default=Path("comparison.html"), help="the HTML page")
    verb.set_defaults(run_verb=compare)
    verb = verbs.add_parser("ask", help="ask a question about an image", description=ask.__doc__)
    verb.add_argument(
        "image", type=Path, help="file of an image, or of a video for a model that takes videos"
    )
    verb.add_argument("question")
    verb.add_argument("--model", help="hub id or folder (default: the base the adapter names)")
    verb.add_argument("--adapter", help="run, adapter folder (also of PEFT) or hub id of one")
    verb.add_argument("--device", default="auto")
    verb.add_argument("--quantization", choices=["nf4"], help="language model in 4 bits")
    verb.add_argument("--max-new-tokens", type=int, default=128)
    verb.add_argument("--video-frames", type=int, help="frames shown of a video (as trained)")
    verb.set_defaults(run_verb=ask)
    verb = verbs.add_parser("serve", help="an OpenAI-compatible server", description=serve.__doc__)
    add_serve_arguments(verb)
    add_model_verbs(verbs)
    return parser


def add_model_verbs(verbs: Any) -> None:
    """Add the verbs that make checkpoints."""
    text = "original LLaVA-1.5 checkpoint to transformers"
    verb = verbs.add_parser("convert-llava", help=text, description=convert_llava.__doc__)
    verb.add_argument("source", help="folder or hub id in the original layout")
    verb.add_argument("--out", type=Path, required=True, help="folder to write")
    verb.add_argument("--base", help="language model of a projector or LoRA: id or folder")
    verb.add_argument("--vision", help="CLIP tower: id or folder (default: as the config says)")
    verb.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    verb.set_defaults(run_verb=convert_llava)
    verb = verbs.add_parser(
        "compose", help="make a LLaVA of two parts", description=compose.__doc__
    )
    verb.add_argument(
        "--vision", required=True, help="open_clip:NAME/TAG, open_clip:NAME=FILE or hf:ID_OR_FOLDER"
    )
    verb.add_argument("--language", required=True, help="causal language model: id or folder")
    verb.add_argument("--projector", default="mlp2x_gelu", help="mlp2x_gelu is the one there is")
    verb.add_argument("--out", type=Path, required=True, help="folder to write")
    verb.add_argument("--image-size", type=int, help="side in px (default: the tower's own)")
    verb.add_argument("--feature-layer", type=int, default=-2, help="hidden state of the tower")
    verb.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    verb.add_argument("--allow-pickle", action="store_true", help="also weights that can run code")
    verb.add_argument("--seed", type=int, default=0, help="of the projector's initial weights")
    verb.set_defaults(run_verb=compose)


def add_serve_arguments(verb: argparse.ArgumentParser) -> None:
    """Add what ``serve`` needs to know."""
    verb.add_argument("--model", help="hub id or folder (default: the base the adapters name)")
    verb.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=DIR", help="may be repeated"
    )
    verb.add_argument("--host", default="127.0.0.1", help="default: %(default)s, this machine only")
    verb.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    verb.add_argument("--api-key", help="key that clients must send (or MILORA_API_KEY)")
    verb.add_argument("--device", default="auto")
    verb.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    verb.add_argument("--quantization", choices=["nf4"], help="language model in 4 bits")
    verb.add_argument("--batch-size", type=int, default=8, help="requests in one forward pass")
    verb.add_argument("--queue", type=int, default=64, help="requests held at a time; more get 429")
    verb.add_argument("--max-tokens", type=int, default=1024, help="longest answer")
    verb.add_argument("--timeout", type=float, default=300, help="seconds for one request")
    verb.add_argument("--max-body-mib", type=int, default=32, help="largest request, with images")
    verb.add_argument(
        "--allow-http",
        action="append",
        default=[],
        metavar="HOST",
        help="fetch images from this host (default: data: URLs only); may be repeated",
    )
    verb.set_defaults(run_verb=serve)


def parse_words(words: list[str]) -> argparse.Namespace:
    """Parse the words; overrides may also stand after options, which argparse alone refuses."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(words)
    wrong = [word for word in rest if word.startswith("-") or "=" not in word]
    if wrong or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(wrong or rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code.

    0: done. 1: an error, printed without a traceback unless ``--debug`` is given. 2: wrong words.
    130: interrupted. 143: stopped by SIGTERM after a checkpoint.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # at every start it warns of an optional kernel that would come from the hub
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if words[:1] == ["eval"]:  # its options are its own; argparse would take them for ours
        rest = [*words[1:], "--debug"] if debug else words[1:]
        arguments = argparse.Namespace(run_verb=evaluate, rest=rest)
    else:
        arguments = parse_words(words)
    try:
        return arguments.run_verb(arguments)
    except KeyboardInterrupt:
        print("milora-vl: interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    except StoppedError as error:
        print(f"milora-vl: {error}; the same command goes on from here", file=sys.stderr)
        return STOPPED
    except Exception as error:  # no user is helped by a traceback that was not asked for
        if debug:
            raise
        print(f"milora-vl: error: {explain_error(error)}", file=sys.stderr)
        return 1
