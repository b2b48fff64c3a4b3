"""The page at /: one file, nothing from elsewhere, values as text; in a browser, where there is one."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest
from serve.live import Live
from serve.models import CANDIDATES, CONTEXT, raw_columns, small_ranker

from lt4rec_sparse import save

BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
HOSTILE = '<img src=x onerror="document.title=1">'


def test_the_page_is_one_file_that_runs_its_own_script_alone(client):
    response = client.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:)[a-z/]""", response.text), "nothing from elsewhere"
    assert "innerHTML" not in response.text and "eval(" not in response.text
    assert not re.search(r"\son\w+=", response.text), "the policy admits no handlers in tags"
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy


def test_what_the_page_reads_is_requests_that_rank_takes(client):
    about = client.get("/page.json").json()
    assert about["tasks"] == ["ctr", "cvr"] and about["precisions"] == ["fp32", "bf16", "int8"]
    for example in about["examples"]:
        request = json.loads(example["text"])
        assert request["name"] == example["name"] and set(request["context"]) == {"age"}
        assert len(client.post("/rank", content=example["text"]).json()["ranking"]) == len(request["candidates"]) == 20


@pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_person_sees_the_ranking_and_what_moved(tmp_path, width):
    path, examples = tmp_path / "model.safetensors", tmp_path / "requests.json"
    ranker = small_ranker()
    save(ranker, path)
    named = {"name": HOSTILE, "context": CONTEXT | {"age": HOSTILE}, "candidates": CANDIDATES}
    examples.write_text(json.dumps({"requests": [named]}), encoding="utf-8")
    with Live(path, "--examples", str(examples), "--drain", "0") as live:
        page = browse(f"{live.url}/#precision=int8&by.ctr=0", width, tmp_path / "page.png")
    columns = raw_columns() | {"age": [HOSTILE]}
    plain = ranker.rank(columns).rows.tolist()
    ranked = ranker.to_precision("int8").rank(columns, by={"ctr": 0, "cvr": 1})
    assert 'id="error" role="alert" hidden' in page
    assert "<img" not in page and HOSTILE in unescape(page)
    scores = re.findall(r'data-name="cvr">([\d.e-]+)<', page)
    assert scores == [f"{score:.4f}" for score in ranked.scores["cvr"].tolist()]
    moved = sum(a != b for a, b in zip(plain, ranked.rows.tolist(), strict=True))
    assert moved and f"{moved} moved against fp32" in page
    assert len(re.findall(r">[▲▼] \d+</td>", page)) == moved
    assert (tmp_path / "page.png").stat().st_size > 10_000


@pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install chromium")
def test_a_request_with_settings_of_its_own_is_shown_with_them(tmp_path):
    """And the page's stand in their place, not beside them; an int beyond 2^53 stays what it is."""
    path, examples = tmp_path / "model.safetensors", tmp_path / "requests.json"
    ranker = small_ranker()
    save(ranker, path)
    by = {"ctr": 2, "cvr": 1, "$&": 1}
    candidates = CANDIDATES | {"$&": [1.0, 2.0, 8.0, 0.5, 4.0]}
    named = {"name": "x", "context": CONTEXT, "candidates": candidates, "by": by, "k": 3, "precision": "bf16"}
    examples.write_text(json.dumps({"requests": [named]}), encoding="utf-8")
    with Live(path, "--examples", str(examples), "--drain", "0") as live:
        own = browse(live.url, 1280, tmp_path / "page.png")
        changed = browse(f"{live.url}/#precision=int8&by.ctr=0", 1280, tmp_path / "page.png")
    for page, precision, powers in ((own, "bf16", by), (changed, "int8", by | {"ctr": 0})):
        assert 'id="error" role="alert" hidden' in page
        ranked = ranker.to_precision(precision).rank(raw_columns() | candidates, k=3, by=powers)
        assert re.findall(r'data-name="cvr">([\d.e-]+)<', page) == [f"{x:.4f}" for x in ranked.scores["cvr"].tolist()]
        assert f"by {' · '.join(f'{name}^{power}' for name, power in powers.items())} in {precision}" in unescape(page)


def browse(url, width, picture):
    """Return the page as a browser has it after its script ran, and leave a picture of it."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000"]
    command += ["--timeout=20000", f"--window-size={width},1600", "--hide-scrollbars"]
    for what in (f"--screenshot={picture}", "--dump-dom"):
        done = subprocess.run([*command, what, url], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout
