"""`fdjax report`: what stands on the page, that it needs nothing else, and that a browser shows it at any width."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import json
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fdjax.commands.main import fdjax_command
from fdjax.errors import UserError
from fdjax.experiments.report import write_report_page
from fdjax.ops import block_dct, block_idct
from fdjax.reports import progression_figure, read_result
from fdjax.reports.closer import closer_section
from fdjax.reports.frequency import coef_mask_figure, equivalence, image_frequencies_figure, strategies_figure
from fdjax.reports.html import page, picture, table
from fdjax.reports.results import epochs_words
from fdjax.reports.run_page import _phase_table
from fdjax.reports.words import asked_words, outcome_words
from tests.fake_runs import CONFIG, changed, make_run, make_summary

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "results" / "quickstart" / "seed0"
HERE = changed(CONFIG, data={"name": "fashion_mnist_subset"})


class Page(HTMLParser):
    """A page taken apart: its text, its elements with their attributes, and its tables as rows of cells."""

    VOID = ("meta", "img", "br", "hr", "link", "input")

    def __init__(self, source: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text, self._open = "", []
        self.feed(source)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def table(self, heading: str) -> list[list[str]]:
        """The one whose first heading is this."""
        (found,) = (rows for rows in self.tables if rows[0][0] == heading)
        return found

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def bench_file(path: Path, macs: dict[str, float], **row) -> Path:
    rows = [
        {"batch": batch, "threads": 1, "dtype": "float32", "dense_ms": 2.0, "frozen_ms": 1.25, "time_ratio": 0.625,
         "frozen_ms_quartiles": [1.2, 1.3], "mac_ratio": macs["ratio"], "paper_ratio": macs["paper_ratio"], **row}
        for batch in (1, 8)
    ]  # fmt: skip
    path.write_text(json.dumps({"rows": rows, "layers": {}, "machine": {"processor": "Some CPU", "jax": "0.10.2"}}))
    return path


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """The page of a real run, the quick start's, with a benchmark of its network; as a user gives the command."""
    folder = tmp_path_factory.mktemp("real")
    bench = bench_file(folder / "bench.json", json.loads((QUICKSTART / "summary.json").read_text())["macs"])
    out = folder / "report.html"
    assert fdjax_command(["report", "--workdir", str(QUICKSTART), "--out", str(out), "--bench", str(bench)]) == 0
    return out


@pytest.fixture(scope="module")
def real_page(real) -> Page:
    return Page(real.read_text(encoding="utf-8"))


# What stands there


def test_the_figures_of_a_real_run_are_those_of_its_summary(real_page):
    summary = json.loads((QUICKSTART / "summary.json").read_text())
    macs = summary["macs"]
    counts = {row[0]: row[1:] for row in real_page.table("MACs of the network")[1:]}
    assert counts["dense"] == [f"{macs['dense']:,}", "1.000×"]
    assert counts["pruned, without transforms"][0] == f"{macs['pruned']:,}"
    assert counts["pruned, with transforms (cheapest exact forms)"] == [f"{macs['total']:,}", f"{macs['ratio']:.3f}×"]
    assert counts["pruned, by the paper's count"] == [f"{macs['paper_total']:,}", f"{macs['paper_ratio']:.3f}×"]
    assert counts["nothing pruned, full DCT and IDCT"][0] == f"{macs['full_transforms']:,}"
    for share in (summary["dense_top1"], summary["top1"]):
        assert f"{100 * share:.2f}%" in real_page.text
    rows = real_page.table("layer")[1:]
    assert [row[0] for row in rows] == [layer["name"] for layer in summary["layers"]]
    for row, layer in zip(rows, summary["layers"], strict=True):
        assert row[3:7] == [f"{layer[key]:,}" for key in ("dense", "pruned", "paper_total", "total")]
        for cell, side in zip(row[8:], ("input", "output"), strict=True):
            kept = layer["kept_counts"][side]
            assert (cell == "–") == (not kept)
            if kept:
                assert sum(map(int, cell.split(" / "))) == sum(kept)
                assert cell.split(" / ")[0] == str(kept[0]) and cell.split(" / ")[-1] == str(kept[-1])
    phases = real_page.table("phase")[1:]
    assert [row[:2] for row in phases] == [[phase["name"], f"{phase['steps']:,}"] for phase in summary["phases"]]


def test_a_real_run_has_its_words_pictures_and_times(real_page):
    texts = [image["alt"] for image in real_page.all("img")]
    for expected in ("Accuracy, MAC ratio and loss", "MACs of each pointwise layer", "FCMask values",
                     "Share of channels", "Test images, their coefficients", "Four ways to prune",
                     "as a function of FCMask", "A pointwise layer as one product", "Time against MACs"):  # fmt: skip
        assert any(expected in (text or "") for text in texts), expected
    asked = {row[0]: row[1] for table in real_page.tables for row in table if len(row) == 2}
    assert asked["Network"].startswith("mobilenetv2_small at width 1") and asked["Seed"] == "0"
    assert "0.5 of the dense network's MACs, transforms included" in asked["Target"]
    assert "epochs) of masks: adam" in asked["Phase learn"]
    times = real_page.table("batch")
    assert [row[:5] for row in times[1:]] == [[str(n), "1", "float32", "2.000", "1.250"] for n in (1, 8)]
    assert "bench.json: medians for a batch, on Some CPU, jax 0.10.2." in real_page.text


def test_the_way_that_masks_went_is_said():
    by_aim = changed(CONFIG, learn={"approach": "aim", "sharpen": 0.3})
    for config, end in ((CONFIG, "constant"), (by_aim, "; along an aim; drawn to their levels, 0.3 of the way")):
        words = dict(asked_words(read_result("run", config, make_summary(config)), [{"name": "learn", "steps": 10}]))
        assert words["Phase learn"].endswith(end)


def test_a_page_is_whole_in_itself(real, real_page):
    assert real.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert not real_page.all("link") and not real_page.all("iframe")
    # Numbers, and the one script that the policy allows by its hash.
    assert real_page.all("script") == [{"type": "application/json"}, {}]
    assert all((image["src"] or "").startswith("data:image/") and image["alt"] for image in real_page.all("img"))
    assert all((link["href"] or "").startswith("#") for link in real_page.all("a"))
    metas = real_page.all("meta")
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    (policy,) = (meta["content"] for meta in metas if meta.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in str(policy)
    assert real_page.all("html") == [{"lang": "en"}]
    source = real.read_text(encoding="utf-8")
    script = source[source.rindex("<script>") + len("<script>") : source.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert str(policy).endswith(f"script-src 'sha256-{digest}'") and "unsafe-inline'; script" in str(policy)
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style and "@import" not in style and "@media print" in style


def test_several_runs_are_compared_and_those_without_a_result_listed(tmp_path, capsys):
    workdirs = [make_run(tmp_path / "here" / f"seed{seed}", changed(HERE, seed=seed), top1=0.7 + seed / 100)
                for seed in (0, 1)]  # fmt: skip
    begun = make_run(tmp_path / "begun", HERE)
    (begun / "summary.json").unlink()
    same_name = make_run(tmp_path / "there" / "seed0", changed(HERE, learn={"target_macs": 0.3}), ratio=0.3)
    given = [str(folder) for folder in (*workdirs, begun, same_name, tmp_path / "nowhere", workdirs[0])]
    other = bench_file(tmp_path / "other.json", {"ratio": 0.111, "paper_ratio": 0.2})
    out = tmp_path / "report.html"
    out.write_text("an older report")
    assert fdjax_command(["report", "--workdir", *given, "--out", str(out), "--bench", str(other)]) == 0
    said = capsys.readouterr()
    assert "left out: tmp" not in said.err and len(said.err.splitlines()) == 2
    shown = Page(out.read_text(encoding="utf-8"))
    assert "Left out, without a result: 2 of 5 workdirs" in shown.text
    assert "not finished (no summary.json)" in shown.text and "is no directory" in shown.text
    rows = shown.table("run")
    names = {row[0] for row in rows[1:]}
    assert names == {"here/seed0", "here/seed1", "there/seed0", "mean of 2"}
    column = rows[0].index("pruned top-1")
    assert {row[0]: row[column] for row in rows[1:]}["here/seed1"] == "71.00%"
    assert {row[0]: row[column] for row in rows[1:]}["mean of 2"].startswith("70.50% (70.00..71.00)")
    targets = {link["href"] for link in shown.all("a")}
    assert {f"#{attributes['id']}" for _, attributes in shown.elements if "id" in attributes} == targets
    assert "Measured time of other frozen networks" in shown.text


def test_times_on_several_engines_stand_with_their_run(tmp_path):
    """The timed program may have fewer MACs than the masks leave, by which the run is found."""
    make_run(tmp_path / "half", HERE, ratio=0.5)
    make_run(tmp_path / "third", changed(HERE, seed=1), ratio=0.3)
    same = {"batch": 1, "threads": 1, "mask_ratio": 0.3, "paper_ratio": 1.5 * 0.3}
    rows = []
    for engine, dense, pruned in (("native", 2.0, 1.25), ("onnxruntime", 4.0, 5.0)):
        for form, ms in (("dense", dense), ("pruned", pruned)):
            times = {"ms": ms, "ms_quartiles": [0.9 * ms, 1.1 * ms], "time_ratio": ms / dense}
            rows.append(
                {**same, "form": form, "engine": engine, "mac_ratio": 1.0 if form == "dense" else 0.28, **times}
            )
        rows.append({**same, "form": "pruned", "engine": "openvino", "mac_ratio": 0.28, "error": "it cannot"})
    file = tmp_path / "engines.json"
    file.write_text(json.dumps({"rows": rows, "machine": {"processor": "Some CPU"}}))
    write_report_page([str(tmp_path / name) for name in ("half", "third")], tmp_path / "out.html", [str(file)])
    shown = Page((tmp_path / "out.html").read_text(encoding="utf-8"))
    (times,) = [table for table in shown.tables if table[0][0] == "engine"]
    assert times[1:] == [
        ["native", "1", "1", "2.000", "1.250", "0.625", "0.280"],
        ["onnxruntime", "1", "1", "4.000", "5.000", "1.250", "0.280"],
    ]
    assert "Measured time of other frozen networks" not in shown.text
    assert shown.text.count("engines.json: medians") == 1


def test_names_cannot_become_markup(tmp_path):
    folder = make_run(tmp_path / "<b>&amp;'\"", HERE)
    write_report_page([str(folder)], tmp_path / "out.html")
    shown = Page((tmp_path / "out.html").read_text(encoding="utf-8"))
    assert "<b>&amp;'\"" in shown.text and not shown.all("b")
    assert Page(table(["<i>"], [["</td>&"]])).tables == [[["<i>"], ["</td>&"]]]


def test_what_a_file_says_cannot_end_the_script_of_numbers() -> None:
    counts = dict.fromkeys(("dense", "pruned", "paper_total", "total"), 1)
    layers = [{"name": "</script><b>x", "kind": "pointwise", **counts}, {"name": "without counts"}]
    (part,) = closer_section(layers, np.zeros((0, 1, 1, 1), np.uint8), ())
    assert part.count("</script>") == 1 and "\\u003c/script>\\u003cb>x" in part and "without counts" not in part
    assert closer_section([], np.zeros((0, 1, 1, 1), np.uint8), ()) == []


def test_a_run_whose_data_are_gone_is_reported_without_images(tmp_path):
    folder = make_run(tmp_path / "run", changed(HERE, data={"name": "folder", "path": str(tmp_path / "gone")}))
    write_report_page([str(folder)], tmp_path / "out.html")
    shown = Page((tmp_path / "out.html").read_text(encoding="utf-8"))
    assert "Example images are missing: " in shown.text
    assert not any("Test images" in (image["alt"] or "") for image in shown.all("img"))


# What is refused


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--workdir", "begun", "nowhere", "--out", "r.html"], "there is no finished run to report (begun: it"),
        (["--workdir", "--out", "r.html"], "--workdir"),
        (["--workdir", "run", "--out", "r.txt"], "give a file that ends in .html"),
        (["--workdir", "run", "--out", "no/r.html"], "in a directory that exists"),
        (["--workdir", "run", "--out", "run"], "give a file that can be written"),
        (["--workdir", "run", "--out", "r.html", "--bench", "none.json"], "--bench"),
        (["--workdir", "run", "--out", "r.html", "--bench", "run/summary.json"], "holds no rows of a benchmark"),
        (["--workdir", "run", "--out", "r.html", "--bench", "run/engines.json"], "holds no rows of a benchmark"),
        (["--workdir", "run", "--out", "r.html", "--bench", "run/metrics.jsonl"], "give a file that fdjax bench"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", HERE)
    (make_run(tmp_path / "begun", HERE) / "summary.json").unlink()
    (tmp_path / "run" / "engines.json").write_text('{"rows": [{"engine": "onnxruntime", "form": "dense", "ms": 1.0}]}')
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        fdjax_command(["report", *arguments])
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert stop.value.code == 2 and expected in said
    assert set(tmp_path.rglob("*")) == before


def test_a_file_that_cannot_be_written_is_a_users_error(tmp_path):
    make_run(tmp_path / "run", changed(HERE, data={"name": "folder", "path": "/gone"}))
    with pytest.raises(UserError, match=r"--out .* give a file that can be written"):
        write_report_page([str(tmp_path / "run")], tmp_path / "no" / "out.html")


# Words and pictures


def test_what_came_out_is_said_with_its_uncertainty():
    said = outcome_words(read_result("a", CONFIG, make_summary(top1=0.5, dense_top1=0.6)))
    # sqrt(0.5 * 0.5 / 2000) = 1.118 points
    assert "50.00% of 2,000 test images right (standard error 1.12 points) with 500.00 k MACs" in said
    assert "The dense network has 60.00%: the pruned one has 10.00 points less." in said
    assert "0.20 points more" in outcome_words(read_result("a", CONFIG, make_summary(top1=0.602, dense_top1=0.6)))
    dense = changed(CONFIG, phases=("pretrain",))
    assert outcome_words(read_result("a", dense, make_summary(dense))).startswith("The dense network has 70.00%")


@pytest.mark.parametrize(
    ("epochs", "words"),
    [(1, "1 epoch"), (1.0, "1 epoch"), (0.00213, "0.00213 epochs"), (1.1875, "1.19 epochs"), (1234, "1234 epochs")],
)
def test_lengths_are_in_words(epochs, words):
    assert epochs_words(epochs) == words


def test_phases_of_the_run_before_are_said_to_be_its_own():
    summary = make_summary(skipped=1)
    words = dict(asked_words(read_result("a", CONFIG, summary), summary["phases"]))
    assert words["Phase pretrain"] == "done by the run that this one started from"
    assert words["Phase refine"].startswith("100 steps (8 epochs) of weights under rounded masks: sgd")
    assert words["Masks"].startswith("tied, levels 0,1,N, penalty macs; blocks: 2")


def masks_in(figure) -> list[np.ndarray]:
    """Of each panel of kept and pruned cells."""
    meshes = [axes.collections[0] for axes in figure.axes]
    return [np.asarray(mesh.get_array()).reshape(mesh._coordinates.shape[0] - 1, -1) for mesh in meshes]


def test_figure_1_keeps_one_half_in_four_ways():
    figure = strategies_figure()
    assert all(axes.get_ylim() == (16, 0) for axes in figure.axes), "the first channel above"
    whole, coefficients, pairs, bands = masks_in(figure)
    assert all(mask.mean() == 0.5 for mask in (whole, coefficients, pairs, bands))
    assert set(whole.mean(1)) == {0, 1} and set(coefficients.mean(0)) == {0, 1}
    assert (np.diff(bands.astype(int), axis=1) <= 0).all(), "each channel keeps a prefix"
    assert not (np.diff(pairs.astype(int), axis=1) <= 0).all()


@pytest.mark.parametrize("fcmask", [0.0, 0.3, 0.9, 1.0])
def test_figure_2_is_the_papers_formula(fcmask):
    paper, own = coef_mask_figure(4, levels=(0, 1)).axes
    for n, line in enumerate(paper.get_lines()):
        x, y = line.get_data()
        expected = np.clip((fcmask - n / 4) * 4, 0, 1)
        assert np.interp(fcmask, x, y) == pytest.approx(expected, abs=1e-5)
    assert [line.get_label() for line in own.get_lines()] == ["0", "1 to 15"]


def test_figure_4_computes_one_layer_three_ways():
    same = equivalence(side=8, channels=6, block=2)
    assert 0 <= same.plain_error < 1e-5 and 0 <= same.banded_error < 1e-5
    assert same.dense_macs == 8 * 8 * 6 * 6
    bands = masks_in(same.figure)[-4:]
    assert same.banded_macs == 16 * sum(int(band.sum()) for band in bands) < same.dense_macs


def test_images_are_shown_with_their_coefficients_and_what_is_left_of_them():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 8, 12, 1), np.uint8)
    axes = image_frequencies_figure(images, 2, ["a", "b"]).axes
    assert len(axes) == 2 * 6 and [axes[0].get_title(), axes[6].get_title()] == ["a", "b"]
    shown = [np.asarray(a.images[0].get_array(), float) for a in axes[:6]]
    pixels = images[0, ..., 0] / 255
    # The tiles hold every amplitude once: their energy is the image's (the transform is orthonormal).
    amplitudes = 10 ** shown[1] - 1e-3
    assert (amplitudes**2).sum() == pytest.approx((pixels**2).sum(), rel=1e-4)
    means = pixels.reshape(4, 2, 6, 2).mean((1, 3))
    np.testing.assert_allclose(shown[2], np.kron(means, np.ones((2, 2))), atol=1e-5)
    np.testing.assert_allclose(shown[5], pixels, atol=1e-5)
    errors = [float(a.get_title().split("error ")[1].split()[0]) for a in axes[2:6]]
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0


def test_the_progression_is_that_of_all_sides_together():
    def record(step, expand, head):
        return {"step": step, "phase": "learn", "kept_counts": {"expand": {"input": None, "output": expand},
                                                                "head": {"input": head, "output": None}}}  # fmt: skip

    figure = progression_figure([record(1, [0, 0, 0, 0, 6], [0, 2]), {"step": 2}, record(3, [3, 1, 1, 0, 1], [0, 2])])
    heights = [[bar.get_height() for bar in bars] for bars in figure.axes[0].containers]
    np.testing.assert_allclose(heights, [[0, 37.5], [0, 12.5], [0, 12.5], [100, 37.5]])


def test_the_same_figure_gives_the_same_page():
    figure = coef_mask_figure(2)
    assert picture(figure, "a") == picture(figure, "a")


# In a browser

PROBE = """<!DOCTYPE html><title>probe</title><body>{frames}<script>
onload = () => {{
  const found = [...document.querySelectorAll("iframe")].map(frame => {{
    const inside = frame.contentDocument, view = frame.contentWindow;
    return {{
      page: frame.getAttribute("src"), width: view.innerWidth, scroll: inside.scrollingElement.scrollWidth,
      height: inside.scrollingElement.scrollHeight,
      text: parseFloat(view.getComputedStyle(inside.querySelector("p")).fontSize),
      images: [...inside.images].map(image => image.complete && image.naturalWidth > 0),
      fetched: view.performance.getEntriesByType("resource").map(entry => entry.name)
                   .filter(name => !name.startsWith("data:")),
    }};
  }});
  document.body.textContent = JSON.stringify(found);
}};
</script>"""


def test_a_browser_shows_it_at_any_width_without_fetching_anything(real, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium is installed (Debian: apt-get install chromium)")
    shutil.copy(real, tmp_path / "report.html")
    # What the probe must be able to see: a page that is too wide, and one that fetches a picture.
    (tmp_path / "wide.html").write_text(page("w", '<p>w</p><div style="width: 2000px">w</div>'))
    (tmp_path / "fetching.html").write_text('<!DOCTYPE html><p>f</p><img src="missing.png">')
    frames = [("report.html", 1280), ("report.html", 390), ("wide.html", 390), ("fetching.html", 390)]
    (tmp_path / "probe.html").write_text(
        PROBE.format(frames="".join(f'<iframe src="{file}" width="{w}" height="800"></iframe>' for file, w in frames))
    )
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *arguments):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
                "--dump-dom", f"http://127.0.0.1:{server.server_port}/probe.html",
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        server.shutdown()
    assert done.returncode == 0, done.stderr
    shown = Page(done.stdout[done.stdout.index("<body") : done.stdout.rindex("</body>") + len("</body>")]).text
    desktop, phone, wide, fetching = json.loads(shown)
    for seen, width in ((desktop, 1280), (phone, 390)):
        assert seen["width"] == width and seen["scroll"] <= width
        assert len(seen["images"]) > 8 and all(seen["images"]), "every picture is drawn"
        assert seen["text"] >= 16 and seen["fetched"] == []
    assert phone["height"] > desktop["height"], "the page is laid out anew for the phone"
    assert wide["scroll"] >= 2000 and len(fetching["fetched"]) == 1
    assert sorted(set(asked) - {"/favicon.ico"}) == [
        "/fetching.html", "/missing.png", "/probe.html", "/report.html", "/wide.html",
    ]  # fmt: skip


EXPLORER = """<!DOCTYPE html><title>probe</title><body>
<iframe src="report.html" width="{width}" height="900"></iframe><script>
onload = () => {{
  const frame = document.querySelector("iframe"), inside = frame.contentDocument;
  const all = q => [...inside.querySelectorAll(q)];
  const one = q => inside.querySelector(q).textContent, hover = new frame.contentWindow.Event("pointerenter");
  const rows = all(".closer .bars button"), found = {{ layers: rows.map(row => row.firstChild.textContent) }};
  rows[1].dispatchEvent(hover);
  found.hovered = one(".closer .told");
  rows[2].click();
  rows[1].dispatchEvent(hover);
  found.kept = one(".closer .told strong");
  rows[2].click();
  rows[1].dispatchEvent(hover);
  found.groups = all(".closer .strip button").map(piece => {{
    piece.dispatchEvent(hover);
    return one(".closer .told .group");
  }});
  const shown = () => rows[0].querySelectorAll("i").length - all(".closer .bars button:first-child i").filter(
    bar => frame.contentWindow.getComputedStyle(bar).display === "none").length;
  found.bars = [shown()];
  all(".closer input[type=checkbox]")[0].click();
  found.bars.push(shown());
  const range = inside.querySelector(".closer input[type=range]");
  const errorAt = count => {{
    range.value = count;
    range.dispatchEvent(new frame.contentWindow.Event("input"));
    return parseFloat(one(".closer .picture .group").match(/error ([0-9.]+)/)[1]);
  }};
  found.errors = [1, 2, 3, 4].map(errorAt);
  found.fits = inside.scrollingElement.scrollWidth <= {width};
  document.body.textContent = JSON.stringify(found);
}};
</script>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_explores_layers_groups_and_an_image(real, tmp_path, width):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium is installed (Debian: apt-get install chromium)")
    shutil.copy(real, tmp_path / "report.html")
    (tmp_path / "probe.html").write_text(EXPLORER.format(width=width))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
             "--dump-dom", f"http://127.0.0.1:{server.server_port}/probe.html"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        server.shutdown()
    assert done.returncode == 0, done.stderr
    shown = Page(done.stdout[done.stdout.index("<body") : done.stdout.rindex("</body>") + len("</body>")]).text
    found = json.loads(shown)
    layers = json.loads((QUICKSTART / "summary.json").read_text())["layers"]
    assert found["layers"] == [layer["name"] for layer in layers]
    assert f"{layers[1]['name']}: {layers[1]['kind']}" in found["hovered"]
    assert f"dense {layers[1]['dense']:,}" in found["hovered"] and f"form {layers[1]['total']:,}" in found["hovered"]
    assert found["kept"] == layers[2]["name"], "a click keeps a layer"
    kept = {side: counts for side, counts in layers[1]["kept_counts"].items() if counts}
    expected = [f"{n} of {sum(counts)} channels" for counts in kept.values() for n in counts if n]
    assert len(found["groups"]) == len(expected) > 1
    assert all(part in said for part, said in zip(expected, found["groups"], strict=True))
    assert found["bars"] == [4, 3] and found["fits"]
    # The script's DCT is that of fdjax.ops.
    source = real.read_text(encoding="utf-8")
    numbers = re.search(r'<script type="application/json">(.*?)</script>', source, re.DOTALL)
    assert numbers is not None
    first = json.loads(numbers[1])["images"][0]
    image = np.array(first["pixels"], np.float32).reshape(first["height"], first["width"], first["channels"])
    for count, error in enumerate(found["errors"], 1):
        back = np.asarray(block_idct(block_dct(image, 2)[..., :count, :], 2, image.shape[:2]))
        assert abs(float(np.sqrt(np.mean((back - image) ** 2))) - error) <= 0.051


def test_a_page_has_the_accuracy_of_each_class_and_what_is_taken_for_what() -> None:
    from fdjax.reports.classes import classes_section

    summary = {"confusion": [[8, 2, 0], [1, 9, 0], [0, 0, 0]], "class_names": ["ant", "<bee>", "cat"]}
    page = "".join(classes_section(summary))
    assert "80.00%" in page and "90.00%" in page and "&lt;bee&gt; (2)" in page and "<bee>" not in page
    assert page.count("<tr>") == 4 + 4  # a heading and three classes, twice
    assert classes_section({}) == [] and classes_section({"confusion": None}) == []
    assert classes_section({**summary, "class_names": ["ant"]}) == []
    many = {"confusion": np.eye(40, dtype=int).tolist(), "class_names": []}
    assert "".join(classes_section(many)).count("<tr>") == 41


def test_a_phase_that_stopped_early_says_what_it_has_done() -> None:
    phases = [
        {"name": "pretrain", "steps": 10_000, "top1": 0.5, "stopped": {"at": 3_000, "best": 2_000}},
        {"name": "refine", "steps": 4_000, "top1": 0.6},
    ]
    table = _phase_table(phases)
    assert "stopped at 3,000 of 10,000, the best at 2,000" in table and "<td>4,000</td>" in table
