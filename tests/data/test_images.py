"""Images of any size, channels and classes as shards: from a folder for each class, and from Parquet."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from corpus import RECIPES, context
from PIL import Image

from overproof.config import Recipe, load_recipe
from overproof.data.manifest import Manifest
from overproof.data.parquet_reader import Shards
from overproof.data.prepare import prepare
from overproof.errors import InputError
from overproof.models.base import shape_of
from overproof.models.hf_directory import build_model, to_tensors
from overproof.models.sizes import model_size
from overproof.models.vit import Vit
from overproof.registry import TASKS

HEIGHT, WIDTH, EACH = 6, 10, 20
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
MODEL = {"kind": "vit", "hidden_size": 16, "intermediate_size": 32, "layers": 1, "heads": 2, "patch_size": 2}
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def picture(colour: tuple[int, int, int], number: int, height: int = HEIGHT, width: int = WIDTH) -> Pixels:
    """One colour, and a corner that tells the image from the others: (H, W, C)."""
    pixels_HWC = np.empty((height, width, 3), np.uint8)
    pixels_HWC[:] = colour
    pixels_HWC[0, 1] = number
    return pixels_HWC


def encoded(pixels: Pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of PNG files for each class."""
    root = tmp_path / "images"
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for number in range(EACH):
            (root / name / f"{number:02d}.png").write_bytes(encoded(picture(colour, number)))
    return root


def recipe(store: Path, source: str, *changes: str) -> Recipe:
    data = (
        f"data={{kind: image_classification, source: {source}, shards: 2, rows_per_group: 4, "
        "validation_fraction: 0.2, test_fraction: 0.2}"
    )
    students = f"sweep.students=[{{name: one, model: {MODEL}}}]"
    return load_recipe(RECIPES / "digits.yaml", (f"store={store}", data, f"train.model={MODEL}", students, *changes))


def prepared(store: Path, source: str, *changes: str) -> tuple[Path, Manifest]:
    given = context(recipe(store, source, *changes))
    prepare(given)
    return Path(given.draft.uri), Manifest.read(Path(given.draft.uri))


def folder_of(path: Path) -> str:
    return f"{{kind: folder, path: '{path}'}}"


def rows_of(root: Path, manifest: Manifest) -> dict[tuple[int, ...], int]:
    """The label of every image of every split, by its pixels as bytes."""
    found: dict[tuple[int, ...], int] = {}
    for split in manifest.splits:
        shards = Shards(root, split)
        rows = shards.take(np.arange(shards.rows))
        for pixels_CHW, label in zip(rows["pixels"], rows["label"], strict=True):
            key = tuple(np.rint(255 * pixels_CHW).astype(int).ravel().tolist())
            assert key not in found
            found[key] = int(label)
    return found


def expected(classes: list[str]) -> dict[tuple[int, ...], int]:
    return {
        tuple(picture(COLOURS[name], number).transpose(2, 0, 1).ravel().tolist()): classes.index(name)
        for name in COLOURS
        for number in range(EACH)
    }


def test_a_folder_of_classes_becomes_rows_of_three_channels(folder: Path, tmp_path: Path) -> None:
    root, manifest = prepared(tmp_path, folder_of(folder))
    details = dict(manifest.details)
    example = details.pop("example")
    assert details == {"channels": 3, "height": HEIGHT, "width": WIDTH, "classes": ["blue", "green", "red"]}
    assert (manifest.task, manifest.outputs, manifest.positions) == ("image_classification", 3, 1)
    assert manifest.columns[0].shape == (3, HEIGHT, WIDTH)
    found, known = rows_of(root, manifest), expected(["blue", "green", "red"])
    assert found.items() <= known.items()
    assert len(known) - len(found) < manifest.rows_per_group
    first = Shards(root, "test").take(np.array([0]))["pixels"]
    np.testing.assert_allclose(example, first.ravel())
    recipe_shape = TASKS["image_classification"].shape(recipe(tmp_path, folder_of(folder)).data)
    assert recipe_shape.details == details


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_gives_the_same_rows_as_the_folder(folder: Path, tmp_path: Path, nested: bool) -> None:
    files = sorted(folder.rglob("*.png"))
    content: list[Any] = [file.read_bytes() for file in files]
    if nested:  # as the Hugging Face Hub has images
        content = [{"bytes": each, "path": file.name} for each, file in zip(content, files, strict=True)]
    table = pa.table({"picture": content, "colour": [file.parent.name for file in files]})
    pq.write_table(table, tmp_path / "images.parquet")
    source = f"{{kind: parquet, path: '{tmp_path / 'images.parquet'}', image: picture, label: colour}}"
    (one, first), (two, second) = prepared(tmp_path / "a", folder_of(folder)), prepared(tmp_path / "b", source)
    assert first == second
    assert rows_of(one, first) == rows_of(two, second)


def test_numbers_name_classes_in_their_order(tmp_path: Path) -> None:
    table = pa.table(
        {
            "image": [encoded(picture((number, 0, 0), number)) for number in range(60)],
            "label": [(2, 10, 1)[number % 3] for number in range(60)],
        }
    )
    pq.write_table(table, tmp_path / "images.parquet")
    root, manifest = prepared(tmp_path, f"{{kind: parquet, path: '{tmp_path / 'images.parquet'}'}}")
    assert manifest.details["classes"] == ["1", "2", "10"]
    assert all(label == (1, 2, 0)[pixels[0] % 3] for pixels, label in rows_of(root, manifest).items())


def test_images_are_scaled_and_made_grey_where_the_recipe_says(folder: Path, tmp_path: Path) -> None:
    (folder / "red" / "large.png").write_bytes(encoded(picture(COLOURS["red"], 99, 30, 20)))
    root, manifest = prepared(tmp_path, folder_of(folder), "data.height=4", "data.width=8", "data.channels=1")
    assert manifest.columns[0].shape == (1, 4, 8)
    assert (manifest.details["channels"], manifest.details["height"], manifest.details["width"]) == (1, 4, 8)
    alike = sum(manifest.dropped.values())  # so small and grey some are the same to the last pixel
    assert sum(split.rows for split in manifest.splits.values()) + alike > 3 * EACH - manifest.rows_per_group
    pixels = Shards(root, "validation").take(np.array([0]))["pixels"]
    assert 0 <= pixels.min() <= pixels.max() <= 1


def test_the_digits_are_scaled_too(tmp_path: Path) -> None:
    root, manifest = prepared(tmp_path, "{kind: digits}", "data.height=12", "data.width=16")
    assert manifest.columns[0].shape == (1, 12, 16)
    assert Shards(root, "test").take(np.array([0]))["pixels"].shape == (1, 1, 12, 16)


def test_a_vit_takes_images_that_are_not_square(folder: Path, tmp_path: Path) -> None:
    root, manifest = prepared(tmp_path, folder_of(folder))
    section = Vit.model_validate(MODEL)
    model = build_model(section, manifest, 0)
    found = TASKS["image_classification"].predict(model, to_tensors(Shards(root, "test").take(np.arange(3))))
    assert found.logits_BPV.shape == (3, 1, 3)
    assert torch.isfinite(found.logits_BPV).all()
    size = model_size(section, shape_of(manifest))
    assert sorted(size.tensors) == sorted(p.numel() for p in model.parameters())
    assert size.places == (HEIGHT // 2) * (WIDTH // 2) + 1


@pytest.mark.parametrize("patch_size", [4, 5])
def test_a_patch_that_does_not_divide_the_images_is_refused(folder: Path, tmp_path: Path, patch_size: int) -> None:
    _, manifest = prepared(tmp_path, folder_of(folder))
    section = Vit.model_validate(MODEL | {"patch_size": patch_size})
    words = rf"model\.patch_size {patch_size} does not divide images of 6 x 10 pixels; expected a divisor of both"
    with pytest.raises(InputError, match=words):
        build_model(section, manifest, 0)
    with pytest.raises(InputError, match=words):
        model_size(section, shape_of(manifest))


def test_images_of_several_sizes_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "red" / "zz.png").write_bytes(encoded(picture(COLOURS["red"], 99, 8, 10)))
    with pytest.raises(
        InputError, match=r"zz\.png: 8 x 10 pixels, the first has 6 x 10; .*data\.height and data\.width"
    ):
        prepared(tmp_path, folder_of(folder))


def test_a_folder_that_is_laid_out_otherwise_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "loose.png").write_bytes(encoded(picture(COLOURS["red"], 0)))
    with pytest.raises(InputError, match=r"loose\.png: lies beside the classes' folders; expected .*/CLASS/loose\.png"):
        prepared(tmp_path, folder_of(folder))
    (tmp_path / "empty").mkdir()
    for missing, words in (("empty", r"none of its 0 entries matches \.png"), ("none", "not found")):
        with pytest.raises(InputError, match=rf"data\.source\.path: .*{missing}: {words}"):
            prepared(tmp_path, folder_of(tmp_path / missing))


def test_a_file_that_is_no_image_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "red" / "05.png").write_bytes(b"text")
    with pytest.raises(InputError, match=r"red/05\.png: not an image: .*expected one of \.png"):
        prepared(tmp_path, folder_of(folder))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [b"x"], "other": [1]}, "columns are image, other; expected 'label'"),
        ({"image": [None], "label": [1]}, "row 0: no image bytes or no class; expected both"),
        ({"image": ["name.png"], "label": [1]}, "row 0: no image bytes or no class; expected both"),
        ({"image": [b"x"], "label": [1]}, r"row 0: not an image"),
    ],
)
def test_parquet_that_holds_no_images_is_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "images.parquet")
    with pytest.raises(InputError, match=message):
        prepared(tmp_path, f"{{kind: parquet, path: '{tmp_path / 'images.parquet'}'}}")


def test_height_and_width_belong_together(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="height and width belong together"):
        recipe(tmp_path, "{kind: digits}", "data.height=4")


def test_the_digest_follows_the_files(folder: Path, tmp_path: Path) -> None:
    data = recipe(tmp_path, folder_of(folder)).data
    digest = TASKS["image_classification"].source_digest
    before = digest(data)
    assert digest(data) == before
    (folder / "red" / "99.png").write_bytes(encoded(picture(COLOURS["red"], 99)))
    assert digest(data) != before
