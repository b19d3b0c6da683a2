import datetime
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.plan.placement_plan import PlacementPlan, save_plan
from megatron_scalemoe.report.collect import collect
from megatron_scalemoe.report.html import make_report
from megatron_scalemoe.topology.graph import Link, Topology, Vertex
from megatron_scalemoe.topology.topology_file import save_topology
from megatron_scalemoe.traffic.trace import RoutingTrace, save_trace
from tests.report import small_run
from tests.report.small_run import write_json, write_run

DATE = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc)
EVIL = "<script>alert(1)</script>"
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; every tag must be closed in its order."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


def html_of(directory, command="scalemoe report 'a b'"):
    return make_report(collect(directory), CostModel(), command=command, date=DATE, progress=lambda _: None)[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = write_run(tmp_path_factory.mktemp("whole") / "run-7")
    return directory, html_of(directory)


def test_the_page_needs_nothing_from_outside(whole):
    page = Page(whole[1])
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    for name in ("src", "href", "xlink:href"):
        assert all(value.startswith(("#", "data:image/png;base64,")) for value in page.values(name))
    assert "@import" not in whole[1]
    assert not re.search(r"url\((?!#)", whole[1])


def test_links_lead_to_sections_and_ids_are_unique(whole):
    page = Page(whole[1])
    ids = page.values("id")
    assert len(set(ids)) == len(ids)
    assert {value[1:] for tag, name, value in page.attributes if tag == "a" and name == "href"} <= set(ids)


def test_every_picture_is_described_and_has_a_table(whole):
    page = Page(whole[1])
    pictures = [value for tag, name, value in page.attributes if tag == "div" and name == "aria-label"]
    assert len(pictures) == page.tags.count("figure") == 10
    assert page.values("role").count("img") == 10
    assert page.tags.count("table") >= 10


def test_the_same_run_gives_the_same_page(whole):
    assert html_of(whole[0]) == whole[1]


def test_provenance_has_command_date_and_hashes(whole):
    text = " ".join(Page(whole[1]).words)
    for part in ("scalemoe report 'a b'", "2026-01-02T03:04:05+00:00", small_run.trace().content_hash[:16], "memetic", "hidden_size"):
        assert part in text
    assert small_run.plan().content_hash[:16] in text


def test_names_and_values_from_files_never_become_markup(tmp_path):
    evil_rows = [{**row, "policy": f"{EVIL}{i}"} for i, row in enumerate(small_run.compare()["rows"])]
    write_json(tmp_path / "a<b onload=x>'\".json", {"rows": evil_rows})
    write_json(tmp_path / "bench.json", {"rows": [{**row, "dispatcher": EVIL} for row in small_run.bench_dispatch()["rows"]]})
    write_json(tmp_path / "solvers.json", {"rows": [{**row, "solver": EVIL} for row in small_run.bench_solvers()["rows"]]})
    write_json(tmp_path / "<i>.json", {**small_run.plan_result(), "solver": EVIL})
    write_json(tmp_path / "<u>damaged.json", {"rows": [{"policy": EVIL}]})
    (tmp_path / "<s>other.txt").write_text("x")
    names = [f"{EVIL}{i}" for i in range(4)]
    vertices = [Vertex(name, "gpu", 0) for name in names]
    links = [Link(a, b, 10.0, 1.0) for a in names for b in names if a != b]
    save_topology(Topology.build(EVIL, vertices, links), tmp_path / "t.yaml")
    trace = small_run.trace()
    save_trace(RoutingTrace(trace.counts, meta={"topk": 2, EVIL: EVIL}), tmp_path / "<b>t.npz")
    plan = small_run.plan()
    evil_plan = PlacementPlan(plan.physical_to_logical, 4, 8, {EVIL: EVIL, "trace_hash": EVIL})
    save_plan(evil_plan, tmp_path / "<svg onload=alert(1)>.json")
    html = html_of(tmp_path, command=f"scalemoe {EVIL}")
    page = Page(html)
    assert not {"script", "b", "i", "u", "s"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert html.count("&lt;script&gt;") > 20
    assert sum(EVIL in words for words in page.words) > 20


def test_damaged_and_unknown_files_are_shown_on_the_page(tmp_path):
    write_json(tmp_path / "c.json", small_run.compare())
    (tmp_path / "bad.json").write_text('{"rows": [{"policy": "x"}]}')
    (tmp_path / "notes.md").write_text("x")
    text = " ".join(Page(html_of(tmp_path)).words)
    assert "Damaged, left out: bad.json" in text
    assert "bad.json:1: rows.0: 'step_us' is missing" in text
    assert "notes.md" in text


def test_long_values_are_cut(tmp_path):
    plan = small_run.plan()
    save_plan(PlacementPlan(plan.physical_to_logical, 4, 8, {"note": "x" * 100_000}), tmp_path / "p.json")
    assert "x" * 201 not in html_of(tmp_path)


def test_a_thousand_ranks_stay_below_a_megabyte(tmp_path):
    rng = np.random.default_rng(0)
    ranks, layers = 1024, 2
    counts = rng.poisson(2.0, size=(1, layers, ranks, ranks)).astype(np.int32)
    save_trace(RoutingTrace(counts), tmp_path / "t.npz")
    home = np.stack([rng.permutation(ranks) for _ in range(layers)])
    plan = PlacementPlan.from_hosts(home, home[:, :, None] == np.arange(ranks), replica_slots_per_rank=0)
    save_plan(plan, tmp_path / "p.json")
    assert len(html_of(tmp_path)) < 1_000_000
