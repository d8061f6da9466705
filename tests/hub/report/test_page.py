"""`fedsoda-hub report`: its page needs nothing beside it, also in a real browser.

The browser is headless Chromium where there is one. What pictures look like is for eyes; here: they have their data,
they load, and nothing on the page is wider than the page.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fedsoda_edge.errors import UsageProblem
from fedsoda_hub.federation import records as rec
from fedsoda_hub.report.history import read_history
from fedsoda_hub.report.page import write_report
from fedsoda_hub.report.pictures import draw
from fedsoda_hub.run.ledger import Ledger
from fedsoda_hub.settings.run import RunSettings
from tests.hub.report.recorded import ANN, BOB, RECORDED, A
from tests.hub.runs import FULL, make_run


@pytest.fixture
def run(tmp_path: Path, tiny_llama: Path) -> RunSettings:
    """A run of two edges in its second round."""
    settings = make_run(tmp_path, tiny_llama)
    ledger = Ledger(settings.run_dir / "ledger.sqlite")
    for record in RECORDED:
        ledger.append(record)
    ledger.add_traffic(ANN, 1, 1000, 2000)
    ledger.add_traffic(BOB, 1, 3000, 4000)
    ledger.close()
    return settings


def test_a_run_that_was_not_begun_has_no_report(tmp_path: Path, tiny_llama: Path) -> None:
    settings = make_run(tmp_path, tiny_llama)
    with pytest.raises(UsageProblem, match=r"RUN\.toml has not been started; run `fedsoda-hub serve"):
        write_report(settings, tmp_path / "report")
    ledger = Ledger(settings.run_dir / "ledger.sqlite")  # as `token create` leaves it
    ledger.tokens.create("ann")
    ledger.close()
    with pytest.raises(UsageProblem, match="has not been started"):
        write_report(settings, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_of_greetings_alone_no_bytes_of_an_edge_and_round_are_shown(tmp_path: Path, tiny_llama: Path) -> None:
    settings = make_run(tmp_path, tiny_llama)
    ledger = Ledger(settings.run_dir / "ledger.sqlite")
    for record in RECORDED[:2]:
        ledger.append(record)
    ledger.add_traffic(ANN, 1, 1100, 300)
    assert "an edge and round" not in Path(write_report(settings, tmp_path / "report").report).read_text()
    for record in RECORDED[2:8]:
        ledger.append(record)
    ledger.close()
    page = Path(write_report(settings, tmp_path / "report").report).read_text()
    assert "1.07 KiB / 300 B an edge and round" in page


def test_of_a_full_emulator_no_alignment_is_shown_but_what_nf4_took(tmp_path: Path, tiny_llama: Path) -> None:
    settings = make_run(tmp_path, tiny_llama, **FULL)
    ledger = Ledger(settings.run_dir / "ledger.sqlite")
    kl = {"pruned": 0.0, "quantized": 0.012, "aligned": 0.012}
    ledger.append(RECORDED[0])
    ledger.append(rec.RunPrepared(manifest=A, adapter_view=A, emulator_view=A, public_kl=kl))
    assert list(draw(read_history(ledger), None)) == []
    ledger.close()
    written = write_report(settings, tmp_path / "report")
    page = Path(written.report).read_text()
    assert "<dt>public KL</dt><dd>0.012 as stored, all layers kept</dd>" in page
    assert "aligned" not in page
    assert "after alignment" not in page


def test_a_target_that_cannot_be_written_is_named(run: RunSettings, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UsageProblem, match="taken cannot be written"):
        write_report(run, tmp_path / "taken")


def test_the_page_fetches_nothing_runs_nothing_and_names_no_path_of_the_hub(run: RunSettings, tmp_path: Path) -> None:
    written = write_report(run, tmp_path / "report")
    page = Path(written.report).read_text()
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == sorted(
        ["report.html", *(Path(picture).name for picture in written.pictures)]
    )
    assert [Path(picture).stem for picture in written.pictures] == [
        *("loss", "accuracy", "alignment", "bytes", "contributions")
    ]
    assert not re.search(r"""(src|href)=(?!["']?data:)""", page)
    assert "<script" not in page
    assert "&lt;script&gt;bob" in page
    assert str(tmp_path) not in page
    assert "declined" in page
    assert "<dt>public KL</dt><dd>0.500 pruned, 0.600 as stored, 0.200 aligned</dd>" in page


# --- in a browser --------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
FLAGS += "--disable-component-update --disable-sync --virtual-time-budget=2000 --dump-dom"
ASK = """<script>
addEventListener("load", () => document.body.dataset.found = JSON.stringify({
  widths: [...document.images].map(image => image.naturalWidth),
  headings: [...document.querySelectorAll("h2")].map(heading => heading.textContent),
  rows: document.querySelectorAll("tbody tr").length,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
}));
</script>"""


def browse(page: str, directory: Path, width: int) -> dict[str, object]:
    """What Chromium makes of the page. The copy it opens may run our question, which the page itself forbids."""
    assert CHROMIUM is not None
    asked = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", page) + ASK
    (directory / "asked.html").write_text(asked)
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={directory / 'browser'}", f"--window-size={width},900"]
    shown = subprocess.run(
        [*command, (directory / "asked.html").as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    found = re.search(r'data-found="([^"]*)"', shown.stdout)
    assert found, shown.stderr
    answer: dict[str, object] = json.loads(found[1].replace("&quot;", '"'))
    return answer


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_chromium_shows_every_picture_and_scrolls_nothing_sideways(run: RunSettings, tmp_path: Path) -> None:
    page = Path(write_report(run, tmp_path / "report").report).read_text()
    found = browse(page, tmp_path, 1000)
    assert found["headings"] == [
        *("Loss", "Accuracy", "Alignment", "Bytes by edge and round", "Who contributed when", "Rounds", "Settings")
    ]
    assert found["widths"] == [1368] * 5  # 9.5 inches at 144 dots
    assert found["overflow"] == 0
    # The question finds what it asks for: a cut picture has no width, and something wide scrolls.
    broken = page.replace("base64,iVBOR", "base64,AAAA", 1).replace(
        "</body>", "<div style='width:3000px'>.</div></body>"
    )
    worse = browse(broken, tmp_path, 1000)
    assert worse["widths"] == [0, *[1368] * 4]
    assert worse["overflow"] != 0


def test_the_page_says_of_each_edge_where_its_updates_lay(run: RunSettings, tmp_path: Path) -> None:
    page = Path(write_report(run, tmp_path / "report").report).read_text()
    for cells in (("1.5", "+0.75 / +0.75", "100%"), ("30", "-0.25 / -0.25", "5%")):
        assert "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>" in page
