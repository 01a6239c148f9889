"""Figures 2-4: numbers against slow references, and pictures that show the features given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg

from invertune import data as datasets
from invertune import embedding_figures, figures, steps
from invertune.chain import Chain, open_chain, pretrained
from invertune.embedding_figures import ATTACKED, CLASSES, View, centroid_cosines, silhouettes
from invertune.models import embed_images
from invertune.perturbations import perturb
from invertune.settings import load_settings

QUICK = {"attacks": {"names": ["blended"], "blended": {"steps": 3}}}
QUICK["identification"] = {"steps": 2, "check_steps": 2}
EACH = 3  # images per class


def view(seed: int = 0, shift: float = 0.0) -> View:
    """Clean images around random texts; attacked ones moved aside by ``shift``."""
    generator = torch.Generator().manual_seed(seed)
    texts = F.normalize(torch.randn(CLASSES, 16, generator=generator), dim=1)
    labels = torch.arange(1, CLASSES).repeat_interleave(EACH)
    place = F.normalize(torch.randn(16, generator=generator), dim=0)
    images = {}
    for kind, moved in (("target", 0), ("clean", 0), ("triggered", shift), ("adversarial", shift)):
        centers = texts[:1].expand(EACH, -1) if kind == "target" else texts[labels]
        noise = 0.1 * torch.randn(centers.shape, generator=generator)
        images[kind] = F.normalize(centers + noise + moved * place, dim=1)
    return View(tuple(f"class {i}" for i in range(CLASSES)), images, labels, texts)


def slow_silhouette(clusters: list[torch.Tensor]) -> float:
    """Mean of (b - a) / max(a, b) over the first cluster, pair by pair in float64."""

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        a, b = a.double(), b.double()
        return 1 - float(a @ b / (a.norm() * b.norm()))

    found = []
    for i, image in enumerate(clusters[0]):
        inside = [distance(image, other) for j, other in enumerate(clusters[0]) if i != j]
        a = sum(inside) / len(inside)
        b = min(sum(distance(image, o) for o in c) / len(c) for c in clusters[1:])
        found.append((b - a) / max(a, b))
    return sum(found) / len(found)


@pytest.mark.parametrize("shift", [0.0, 0.4, 3.0])
def test_silhouettes_equal_the_definition(shift: float) -> None:
    seen = view(1, shift)
    clean = [seen.images["clean"][seen.labels == i] for i in range(1, CLASSES)]
    clean.append(seen.images["target"])
    both = torch.cat([seen.images[kind] for kind in ATTACKED])
    clusters = {kind: seen.images[kind] for kind in ATTACKED} | {"together": both}
    slow = {name: slow_silhouette([cluster, *clean]) for name, cluster in clusters.items()}
    assert silhouettes(seen) == pytest.approx(slow, abs=1e-4)


def test_a_place_of_their_own_is_told_from_merging_with_the_classes() -> None:
    assert all(value > 0.8 for value in silhouettes(view(2, 5.0)).values())
    assert all(value < 0 for value in silhouettes(view(2, 0.0)).values())


def test_centroid_cosines_are_those_of_the_mean_features() -> None:
    seen = view(3, 1.0)
    for pair, value in centroid_cosines(seen).items():
        a, b = (seen.images[kind].double().numpy().mean(0) for kind in pair.split("_"))
        expected = float(a @ b / np.sqrt((a @ a) * (b @ b)))
        assert value == pytest.approx(expected, abs=1e-5)


def test_similarities_are_to_the_target_and_to_each_images_own_text() -> None:
    seen = view(4)
    found = seen.similarities("clean")
    for i, (image, label) in enumerate(zip(seen.images["clean"], seen.labels, strict=True)):
        assert found["target"][i] == pytest.approx(float(image @ seen.texts[0]), abs=1e-6)
        assert found["original"][i] == pytest.approx(float(image @ seen.texts[label]), abs=1e-6)


VIEWS = {"clean": view(5), "poisoned": view(6, 2.0)}
DRAW = (embedding_figures.figure2, embedding_figures.figure3, embedding_figures.figure4)


@pytest.mark.parametrize("draw", DRAW)
def test_figures_fit_a_column_uncut_and_come_out_equal(draw, tmp_path) -> None:
    for folder in ("a", "b"):
        figure = draw(VIEWS)
        figures.save(figure, tmp_path / folder, "figure")
    assert len({(tmp_path / folder / "figure.png").read_bytes() for folder in "ab"}) == 1
    assert figure.get_figwidth() == figures.COLUMN_IN
    with rc_context(figures.STYLE):
        FigureCanvasAgg(figure).draw()
        drawn, page = figure.get_tightbbox(), figure.bbox_inches
    assert drawn.x0 > -0.01 and drawn.y0 > -0.01
    assert drawn.x1 < page.x1 + 0.01 and drawn.y1 < page.y1 + 0.01


def test_figure2_shows_every_image_once_and_its_numbers() -> None:
    for axes, seen in zip(embedding_figures.figure2(VIEWS).axes, VIEWS.values(), strict=True):
        sizes = [len(points.get_offsets()) for points in axes.collections]
        assert sizes == [len(seen.images[kind]) for kind in embedding_figures.LOOKS]
        for value in silhouettes(seen).values():
            assert f"{value:.2f}" in axes.get_xlabel()


def test_figure4_shows_all_matrices_on_one_scale() -> None:
    panels = [axes for axes in embedding_figures.figure4(VIEWS).axes if axes.images]
    expected = [seen.images[kind] @ seen.texts.T for seen in VIEWS.values() for kind in ATTACKED]
    for axes, table in zip(panels, expected, strict=True):
        assert np.array_equal(axes.images[0].get_array(), table)
    assert len({axes.images[0].get_clim() for axes in panels}) == 1


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return open_chain(load_settings("smoke", QUICK), tmp_path_factory.mktemp("store"))


def test_views_hold_ten_classes_with_the_target_first_on_each_encoder(chain: Chain) -> None:
    views = embedding_figures.encoder_views(chain, "blended", 0)
    assert list(views) == ["clean", "poisoned"]
    for seen in views.values():
        assert seen.names[0] == chain.settings.target and len(set(seen.names)) == CLASSES
        assert {len(seen.images[kind]) for kind in ("clean", *ATTACKED)} == {len(seen.labels)}
        for features in (seen.texts, *seen.images.values()):
            assert torch.allclose(features.norm(dim=1), torch.ones(len(features)), atol=1e-5)
    assert views["clean"].names == views["poisoned"].names
    assert not torch.equal(views["clean"].images["clean"], views["poisoned"].images["clean"])


def test_the_clean_encoder_sees_the_clean_models_own_perturbation(chain: Chain) -> None:
    seen = embedding_figures.encoder_views(chain, "blended", 0)["clean"]
    kind, tensor = embedding_figures.strongest_perturbation(chain, "none", 0)
    found = steps.identified(chain, "none", 0)
    gains = {
        k: max(v["adversarial"][i] - v["clean"][i] for i in range(len(v["clean"])))
        for k, v in found.metrics["increases"].items()
    }
    assert gains[kind] == max(gains.values())
    assert torch.equal(tensor, found.tensors("perturbations")[kind])
    pool = datasets.labeled_images(
        chain.settings.data, "evaluation", chain.settings.data.evaluation_images, chain.store
    )
    names = datasets.class_names(chain.settings.data)
    images = torch.cat([pool.images[pool.labels == names.index(n)] for n in seen.names[1:]])
    perturbed = perturb(kind, tensor, images.float() / 255)
    features = embed_images(pretrained(chain).clip, perturbed)
    assert torch.allclose(features, seen.images["adversarial"], atol=1e-5)


def test_rows_hold_every_number_of_both_encoders_once(chain: Chain) -> None:
    rows = embedding_figures.embedding_rows(chain)
    assert len({(r["paper_item"], r["metric"], r["variant"]) for r in rows}) == len(rows) == 30
    assert {r["paper_item"] for r in rows} == {"figure2", "figure3", "figure4"}
    assert all(-1 <= float(r["value"]) <= 1 for r in rows if r["metric"] != "asr")
    seen = embedding_figures.encoder_views(chain, "blended", 0)["poisoned"]
    expected = seen.similarities("triggered")["original"].mean()
    variant = "encoder=poisoned;images=triggered;text=original"
    found = next(float(r["value"]) for r in rows if r["variant"] == variant)
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_model_without_trigger_is_refused(chain: Chain) -> None:
    with pytest.raises(ValueError, match="'none' has no trigger"):
        embedding_figures.encoder_views(chain, "none", 0)
