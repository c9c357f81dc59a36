"""Which features of the demo's tower name the drawings of an artist never seen? No bench is used.

    python scripts/bench/demo_features.py --held-out noto --px 112 168 --layers 9 6,8,10,12

For each resolution and choice of hidden states the projector is aligned patch by patch on the train
artists without one, as in stage 1; then objects in pictures of that one are named by the mean over
the patches in their box. Prints the share of objects named rightly, in scenes and alone.
"""

import argparse
from collections.abc import Sequence
from random import Random

import torch
from PIL import Image
from torch.nn import functional

from data_prep.sticker.build import aspects_of
from data_prep.sticker.pictures import paint
from data_prep.sticker.sources import Catalogue
from data_prep.sticker.train import VARIED_RATIO, Stage, plan_drawing, plan_presence, vary_plan
from data_prep.stickervqa import find_catalogue
from milora_vl.data.images import ImageTransform
from milora_vl.model.embedded import cached_demo_base
from milora_vl.model.load import VLM, load_vlm
from milora_vl.training.align import (
    TEMPERATURE,
    LabeledImage,
    align_patches_,
    compute_tower_features,
    label_patches,
    name_embeddings,
)

Pictures = tuple[list[LabeledImage], dict[str, Image.Image]]


def make_pictures(
    catalogue: Catalogue, styles: tuple[str, ...], kinds: Sequence[str], n: int, varied: float
) -> Pictures:
    """Paint pictures of some artists; the path of each is its key among the images."""
    rng = Random(f"{styles}{kinds}")
    stage = Stage(catalogue, aspects_of(catalogue), styles, 4, held_out=False)
    pictures, images = [], {}
    for index in range(n):
        make = plan_drawing if kinds[index % len(kinds)] == "drawing" else plan_presence
        plan = vary_plan(rng, make(rng, stage), varied)
        key = f"{styles}/{index}"
        images[key] = paint(plan, catalogue.sprites)
        names, boxes = zip(*((item.name, item.box) for item in plan.objects), strict=True)
        pictures.append(LabeledImage(key, names, boxes))
    return pictures, images


@torch.no_grad()
def named_rightly(vlm: VLM, names: list[str], found: Pictures) -> float:
    """Return the share of objects whose patches name them among all names."""
    pictures, images = found
    model, transform = vlm.model, ImageTransform(vlm.processor.image_processor)
    targets = functional.normalize(name_embeddings(model, vlm.processor.tokenizer, names), dim=-1)
    right = total = 0
    for picture in pictures:
        image = images[picture.path]
        features = compute_tower_features(model, transform(image)[None])
        patches = functional.normalize(model.model.multi_modal_projector(features)[0], dim=-1)
        shares = (patches @ targets.T / TEMPERATURE).softmax(dim=-1)  # [P, 1 + names]
        grid = round(len(shares) ** 0.5)
        numbers = list(range(1, len(picture.names) + 1))
        labels = label_patches(picture.boxes, numbers, *image.size, grid)
        for number, name in zip(numbers, picture.names, strict=True):
            if (labels == number).any():
                best = shares[labels == number].mean(dim=0)[1:].argmax()
                right += names[int(best)] == name
                total += 1
    return right / total


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--held-out", default="noto", help="a train artist")
    parser.add_argument("--px", type=int, nargs="+", default=[112])
    parser.add_argument("--layers", nargs="+", default=["9", "6,8,10,12"])
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--varied", type=float, default=VARIED_RATIO)
    options = parser.parse_args()
    catalogue = find_catalogue("core", allow_fetch=True, show_progress=True)
    others = tuple(style for style in catalogue.train_styles if style != options.held_out)
    train, images = make_pictures(
        catalogue, others, ("scene", "drawing"), options.pictures, options.varied
    )
    tests = {
        kind: make_pictures(catalogue, (options.held_out,), (kind,), 200, 0.0)
        for kind in ("scene", "drawing")
    }
    names = sorted({name for picture in train for name in picture.names})
    for px in options.px:
        for text in options.layers:
            layers = [int(layer) for layer in text.split(",")]
            vlm = load_vlm(cached_demo_base(px, layers if len(layers) > 1 else layers[0]))
            vlm.model.requires_grad_(False)
            vlm.model.model.multi_modal_projector.requires_grad_(True)
            torch.manual_seed(0)
            align_patches_(
                vlm.model,
                vlm.processor.tokenizer,
                ImageTransform(vlm.processor.image_processor),
                images.__getitem__,
                train,
                steps=options.steps,
                learning_rate=1e-3,
                seed=0,
            )
            shares = {kind: named_rightly(vlm, names, found) for kind, found in tests.items()}
            print(f"{px} px, hidden states {text}: {shares}")


if __name__ == "__main__":
    main()
