"""``python -m milora_vl.eval``: evaluate a model, with or without an adapter."""

import argparse
import json
import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from milora_vl.errors import explain_error
from milora_vl.files import cache_folder, write_json_atomic
from milora_vl.runtime import (
    Precision,
    autocast,
    choose_precision,
    count_layer_shapes,
    from_main_process,
    is_main_process,
    join_processes,
    keep_freed_memory,
)

logger = logging.getLogger(__name__)

DESCRIPTION = """\
Score a LLaVA-style model on benches in their official file formats. Writes results.json and
predictions.jsonl into --out and prints a table: every score with its 95 % interval, beside the
score of the same model without the image and the best constant guess.
"""
EPILOG = """\
benches, and the official files looked for below --data (or in a folder of the bench's name in it)
{benches}
  stickervqa   mmbench, pope and vqav2 of the demo's own set (not scores of those benchmarks)
  lm:TASK,...  text-only tasks of lm-eval-harness (pip install 'milora-vl[text]'), or of *.yaml
               task files of yours in --data
  all          every bench whose files are in --data
Without --data the hub mirrors are used, or copies of them in the folder $MILORA_MIRRORS (POPE/,
GQA/, ..., as parquet files or written by save_to_disk). --data may also name one file, to choose a
split. Where answers are not published (test splits) a submission file is written instead of a
score; mmvet and llava-w get prediction files and judge prompts, and a score only from a judge that
you name.

examples
  python -m milora_vl.eval --bench mmbench --model llava-hf/llava-1.5-7b-hf --data data/mmbench
  python -m milora_vl.eval --bench stickervqa --model BASE --adapter runs/demo/adapter --limit 200
  python -m milora_vl.eval --bench mmvet --model BASE --judge-url URL --judge-model NAME
"""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser."""
    from milora_vl.eval.benches import BENCHES

    listed = [
        f"  {name:<12} " + bench.FILES.replace("\n", "\n" + 15 * " ")
        for name, bench in BENCHES.items()
    ]
    parser = argparse.ArgumentParser(
        prog="python -m milora_vl.eval",
        description=DESCRIPTION,
        epilog=EPILOG.replace("{benches}", "\n".join(listed)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    positive = _at_least(1)
    add(
        "--bench",
        required=True,
        metavar="NAMES",
        help="one, several joined by commas, or all; listed below",
    )
    add(
        "--model",
        metavar="ID_OR_PATH",
        help="hub id or checkpoint folder (default: the base that --adapter names)",
    )
    add(
        "--adapter",
        metavar="ID_OR_PATH",
        help="MiLoRA or other PEFT adapter on that model: run, folder or hub id",
    )
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder or file of the benches (default: hub mirrors; stickervqa: the demo's set)",
    )
    add("--out", type=Path, default=Path("runs/eval"), metavar="DIR", help="default: %(default)s")
    add(
        "--limit",
        type=positive,
        metavar="N",
        help="a seeded sample of N questions of each bench",
    )
    add("--batch-size", type=positive, default=16, metavar="N", help="default: %(default)s")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights (default: the checkpoint's)",
    )
    add(
        "--autocast",
        choices=("auto", "none", "bfloat16", "float16"),
        default="none",
        help="mixed precision on top of --dtype, as training with bf16 or fp16 does; "
        "auto: bfloat16 where that is faster here (default: %(default)s)",
    )
    add("--quantization", choices=("nf4",), help="load the language model in 4 bits")
    add("--no-blind", action="store_true", help="skip the run without images")
    add(
        "--no-text-probe",
        action="store_true",
        help="skip the loss on fixed texts, which shows what an adapter made the model forget",
    )
    add("--prompt-style", metavar="NAME", help="vicuna_v1, chatml, ... (default: by chat template)")
    add("--max-new-tokens", type=positive, metavar="N", help="default: as each bench says")
    add(
        "--allow-errors",
        type=_at_least(0),
        default=0,
        metavar="N",
        help="failed samples per bench that do not fail the run; they count as wrong (default: 0)",
    )
    add(
        "--parity",
        "--parity-check",
        dest="parity_check",
        type=_at_least(0),
        default=0,
        metavar="N",
        help="ask N questions of each bench again "
        "one by one with plain generate and report how many answers differ",
    )
    add("--debug", action="store_true", help="show the traceback of an error")
    add(
        "--endpoint",
        metavar="URL",
        help="ask a server with an OpenAI-compatible API, up to /chat/completions, instead of "
        "loading a model; --model is its name there, the key is MILORA_API_KEY or OPENAI_API_KEY",
    )
    add("--judge-url", metavar="URL", help="OpenAI-compatible endpoint, up to /chat/completions")
    add("--judge-model", metavar="NAME", help="model of the judge; goes beside every score of it")
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, {least} or more")
        return int(text)

    return read


def load_model(arguments: argparse.Namespace) -> Any:
    """Load model and adapter as the options say.

    Raises:
        RuntimeError: If the model cannot be loaded.
        ValueError: If the adapter belongs to another model.
        OSError: If a file is missing.
    """
    import torch

    from milora_vl.adapter.tuned import load_tuned

    dtype = "auto" if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    return load_tuned(
        arguments.model,
        arguments.adapter,
        dtype=dtype,
        device=arguments.device,
        quantization=arguments.quantization,
        prompt_style=arguments.prompt_style,
        together=True,
    )


def choose_autocast(asked: str, model: Any, out: Path) -> Any:
    """Return the dtype of mixed precision, or None for none.

    What "auto" found stays in ``out``: an evaluation that goes on must not change its arithmetic.
    """
    import torch

    from milora_vl.eval.evaluation import JOURNAL

    if asked != "auto":
        return None if asked == "none" else getattr(torch, asked)
    file, found = out / "precision.json", None
    if is_main_process():
        if file.is_file() and (out / JOURNAL).is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
        else:
            precision = choose_precision(
                "auto",
                lambda: count_layer_shapes(model),
                model.device,
                weights=model.dtype,
                backward=False,
                name="--autocast",
            )
            logger.warning("--autocast auto: %s; %s", precision.dtype or "none", precision.reason)
            found = asdict(precision)
            write_json_atomic(file, found)
    return Precision(**from_main_process(found)).dtype


def prepare_model(arguments: argparse.Namespace) -> tuple[Any, AbstractContextManager]:
    """Return the model, or who asks a served one, and the precision to run it in.

    Raises:
        RuntimeError: If the model cannot be loaded.
        ValueError: If the adapter belongs to another model, or the endpoint is none.
        OSError: If a file is missing.
    """
    if arguments.endpoint:
        from milora_vl.eval.endpoint import EndpointAnswerer

        size = arguments.batch_size
        remote = EndpointAnswerer(arguments.endpoint, arguments.model, batch_size=size)
        return remote, nullcontext()
    vlm = load_model(arguments)
    dtype = choose_autocast(arguments.autocast, vlm.model, arguments.out)
    return vlm, autocast(vlm.model.device, dtype)


def _check_endpoint(arguments: argparse.Namespace) -> None:
    """Refuse what only a model in memory can do."""
    given = {
        "--adapter": arguments.adapter,
        "--quantization": arguments.quantization,
        "--prompt-style": arguments.prompt_style,
        "lm: tasks": "lm:" in arguments.bench,
    }
    clash = [name for name, value in given.items() if value]
    if clash:
        raise ValueError(
            f"{', '.join(clash)} and --endpoint: the server chose its model and has it in memory; "
            "name one of its models with --model"
        )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Evaluate as the options say; returns the results."""
    from milora_vl.adapter.tuned import choose_model
    from milora_vl.eval.bench_files import check_images
    from milora_vl.eval.evaluation import bench_names, evaluate, load_items
    from milora_vl.eval.judge import Judge

    benches = "all" if arguments.bench.strip().lower() == "all" else arguments.bench
    bench_names(benches)
    if arguments.endpoint:
        _check_endpoint(arguments)
    else:
        arguments.model, arguments.adapter = choose_model(arguments.model, arguments.adapter)
    data = arguments.data
    if data is None and arguments.bench.strip().lower() == "stickervqa":
        data = cache_folder() / "stickervqa" / "core"
    if data is not None and not data.exists():
        raise FileNotFoundError(
            f"{data}: no such folder; name the benches' folder with --data (the demo's set is made"
            " by `python data_prep/stickervqa.py`)"
        )
    judge = None
    if arguments.judge_url or arguments.judge_model:
        judge = Judge(arguments.judge_url or "", arguments.judge_model or "")
    items = load_items(benches, data, arguments.limit)
    for questions in items.values():
        check_images(questions, arguments.allow_errors)
    vlm, precision = prepare_model(arguments)
    with precision:
        return evaluate(
            vlm,
            benches,
            data,
            arguments.out,
            batch_size=arguments.batch_size,
            limit=arguments.limit,
            blind=not arguments.no_blind,
            max_new_tokens=arguments.max_new_tokens,
            model_name=arguments.model,
            adapter_name=None if arguments.adapter is None else str(arguments.adapter),
            allow_errors=arguments.allow_errors,
            parity_check=arguments.parity_check,
            judge=judge,
            text_probe=not arguments.no_text_probe,
            items=items,
        )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    # at every start it warns of an optional kernel that would come from the hub
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    arguments = build_parser().parse_args(argv)
    keep_freed_memory()
    join_processes()
    from milora_vl.eval.report import print_results

    try:
        results = run(arguments)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on from here\n")
        return 130
    except Exception as error:  # no user is helped by a traceback that was not asked for
        if arguments.debug:
            raise
        sys.stderr.write(f"error: {explain_error(error)}\n")
        return 1
    if not is_main_process():
        return 0
    print_results(results)
    sys.stdout.write(f"results: {arguments.out / 'results.json'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
