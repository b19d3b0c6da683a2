"""`scalemoe flags` as a user meets it: the flags of a job's file, where each comes from, and what is refused."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from megatron_scalemoe.cli.main import main
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.job import flags as job_flags
from megatron_scalemoe.job.flags import flag_words, why_unchecked
from megatron_scalemoe.job.job_file import load_job
from megatron_scalemoe.job.sections import PROGRAMS, SECTIONS, ClusterSection
from megatron_scalemoe.plan.placement_plan import PlacementPlan, save_plan

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))

JOB = """\
schema_version: 1
program: megatron_lm
model:
  num_layers: 4
  hidden_size: 64
  num_attention_heads: 4
  seq_length: 32
parallel:
  expert_model_parallel_size: 4
moe:
  num_experts: 8
training:
  train_iters: 10
  global_batch_size: 16
  lr: 1.0e-3
scalemoe:
  replicas: 4
cluster:
  nodes: 2
  gpus_per_node: 2
"""


@pytest.fixture
def job_file(tmp_path):
    """Writes JOB with some lines replaced."""

    def write(*replacements: tuple[str, str], name: str = "job.yaml", text: str = JOB) -> Path:
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def flags_of(capsys, path: Path) -> dict[str, list[str]]:
    """What `scalemoe flags` prints: the values of each flag."""
    assert main(["flags", str(path)]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    return {words[0]: words[1:] for words in lines}


def refusal(capsys, path: Path) -> str:
    """What is said, on stderr alone."""
    assert main(["flags", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_prints_one_quoted_flag_a_line(capsys, job_file):
    path = job_file(("num_experts: 8", "num_experts: 8\n  moe_layer_freq: ([0]*1+[1]*3)\n  swiglu: false\n  names: [a b, 1]"))
    assert main(["flags", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"--num-layers 4", "--moe-layer-freq '([0]*1+[1]*3)'", "--names 'a b' 1", "--scalemoe-replicas 4"} <= set(lines)
    assert not [line for line in lines if "swiglu" in line or "cluster" in line or "nodes" in line]


def test_adds_defaults_and_what_follows(capsys, job_file):
    flags = flags_of(capsys, job_file())
    assert flags["--moe-dispatcher"] == ["scalemoe"]
    assert flags["--moe-token-dispatcher-type"] == ["alltoall"]  # pretrain_gpt.py's own default is allgather
    assert flags["--max-position-embeddings"] == ["32"]
    assert flags["--tensor-model-parallel-size"] == ["1"]
    assert flags["--exit-signal-handler"] == []
    assert "--sequence-parallel" not in flags
    size = ("expert_model_parallel_size: 4", "expert_model_parallel_size: 2\n  tensor_model_parallel_size: 2")
    assert flags_of(capsys, job_file(size))["--sequence-parallel"] == []


@pytest.mark.parametrize(
    ("replacement", "dispatcher"),
    [
        (("num_experts: 8", "num_experts: 8\n  moe_dispatcher: stock"), "stock"),
        (("scalemoe:\n  replicas: 4\n", ""), "stock"),
        (("scalemoe:\n  replicas: 4\n", "scalemoe:\n"), "scalemoe"),
    ],
)
def test_the_scalemoe_section_switches_us_on(capsys, job_file, replacement, dispatcher):
    flags = flags_of(capsys, job_file(replacement))
    assert flags["--moe-dispatcher"] == [dispatcher]
    assert bool([flag for flag in flags if flag.startswith("--scalemoe")]) == (dispatcher == "scalemoe")


def test_every_value_says_where_it_comes_from(capsys, job_file):
    path = job_file(("schema_version: 1", "schema_version: 1\nextra_flags: [--log-params-norm]"))
    assert main(["flags", str(path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    by_flag = {row["flag"] or f"{row['section']}.{row['option']}": row for row in result["values"]}
    assert (by_flag["--num-layers"]["origin"], by_flag["--num-layers"]["from"]) == ("file", f"{path}:5")
    assert by_flag["cluster.gpus_per_node"]["from"] == f"{path}:21"
    assert (by_flag["--pipeline-model-parallel-size"]["value"], by_flag["--pipeline-model-parallel-size"]["origin"]) == (1, "default")
    assert (by_flag["--max-position-embeddings"]["origin"], by_flag["--max-position-embeddings"]["from"]) == ("derived", "seq_length")
    assert by_flag["extra_flags.None"]["from"] == f"{path}:2"
    assert result["follows"] == {"ranks": 4, "data_parallel_size": 4, "micro_batches": 4, "experts_per_rank": 2}
    assert {"--num-layers", "4", "--lr", "0.001"} <= set(result["flags"])
    assert result["flags"][-1] == "--log-params-norm"
    assert main(["flags", str(path), "--explain"]) == 0
    explained = capsys.readouterr().out
    assert re.search(rf"--num-layers +4 +{re.escape(str(path))}:5\n", explained)
    assert re.search(r"--tensor-model-parallel-size +1 +default\n", explained)
    assert re.search(r"ranks +4\n", explained)


def test_a_base_comes_first_and_null_takes_back(capsys, job_file):
    job_file(name="base.yaml")
    child = job_file(name="child.yaml", text="schema_version: 1\nbase: base.yaml\nmoe: {num_experts: 16}\nscalemoe: {replicas: null}\n")
    flags = flags_of(capsys, child)
    assert flags["--num-experts"] == ["16"]
    assert flags["--num-layers"] == ["4"]
    assert "--scalemoe-replicas" not in flags
    job = load_job(child)
    assert job.places["moe", "num_experts"] == f"{child}:3"
    assert job.places["model", "num_layers"] == f"{child.with_name('base.yaml')}:4"


def test_files_must_not_be_each_others_base(capsys, job_file):
    job_file(name="a.yaml", text="schema_version: 1\nbase: b.yaml\n")
    assert "each other's base" in refusal(capsys, job_file(name="b.yaml", text="schema_version: 1\nbase: a.yaml\n"))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("num_layers: 4", "num_experts: 8", [":4: model.num_experts: stands in another section", "try:   moe.num_experts"]),
        ("num_layers: 4", "--num-layers: 4", [":3: model: 'num_layers' is missing"]),
        ("num_layers: 4", "num_layers: 4\n  --swiglu: true", [":5: model.--swiglu: must be", "try:   swiglu"]),
        ("num_layers: 4", "num_layers: 4\n  num_layers: 8", ["num_layers is given twice", "in lines 4 and 5"]),
        ("num_layers: 4", "num_layers: 4\n  swiglu: {a: 1}", [":5: model.swiglu: must be a number"]),
        ("  replicas: 4", "  replica: 4", [":17: scalemoe.replica: unknown field", "try:   replicas?"]),
        ("  nodes: 2", "  node: 2", [":19: cluster.node: unknown field", "try:   nodes?"]),
        ("training:", "trainig:", [":12: trainig: unknown field", "try:   training?"]),
        ("num_layers: 4", "num_layers: '4'", [":4: model.num_layers: must be an integer", "found: '4'", "try:   no quotes"]),
        ("num_layers: 4", "num_layers: 0", ["must be 1 or more"]),
        ("  replicas: 4", "  migrate: 'no'", [":17: scalemoe.migrate: must be true or false"]),
        ("lr: 1.0e-3", "lr: 1e-3", [":15: training.lr: must be a finite number", "YAML reads 1e-4 as text"]),
        ("nodes: 2", "nodes: 2\n  time: 24:00:00", ["cluster.time: must be text", "found: 86400", "try:   quotes"]),
        ("nodes: 2", "nodes: 2\n  environment: conda", ["must be one of venv, pyxis or apptainer"]),
        ("program: megatron_lm", "program: megatron", [":2: program: must be one of megatron_lm, gpt_moe or bert_moe"]),
        ("program: megatron_lm\n", "", ["'program' is missing"]),
        ("schema_version: 1", "schema_version: 2", [":1: schema_version: must be 1"]),
        (
            "schema_version: 1",
            "schema_version: 1\nextra_flags: [--lr=1]",
            [":2: extra_flags.0: --lr=1 has a section", "training: {lr: ...}"],
        ),
        ("schema_version: 1", "schema_version: 1\nbase: none.yaml", [":2: base: names no file"]),
    ],
)
def test_names_and_types_are_checked(capsys, job_file, old, new, expected):
    said = refusal(capsys, job_file((old, new)))
    for text in expected:
        assert text in said


@pytest.mark.parametrize(
    ("replacements", "expected"),
    [
        ([("size: 4", "size: 3")], [":9: parallel.expert_model_parallel_size", "multiple of expert-TP x EP x PP = 1 x 3 x 1", "4 ranks"]),
        ([("experts: 8", "experts: 6")], ["expert_model_parallel_size: must divide moe.num_experts", "4 and 6", "1, 2, 3, 6"]),
        (
            [("nodes: 2", "nodes: 3"), ("size: 4", "size: 1\n  tensor_model_parallel_size: 4")],
            ["TP x PP x CP = 4 x 1 x 1", "6 ranks = 3 nodes"],
        ),
        (
            [("size: 4", "size: 1\n  pipeline_model_parallel_size: 4"), ("num_layers: 4", "num_layers: 6")],
            ["6 layers do not divide evenly"],
        ),
        ([("replicas: 4", "replicas: 6")], [":17: scalemoe.replicas: must be a multiple of", "6 and 4", "try:   8"]),
        ([("replicas: 4", "replicas: 28")], ["a rank holds no expert twice", "24 or fewer"]),
        ([("replicas: 4", "replicas: 4\n  dispatch: padded")], [":18: scalemoe.dispatch: must be ragged"]),
        ([("size: 16", "size: 18")], [":14: training.global_batch_size", "micro_batch_size x data parallel size = 1 x 4", "try:   20"]),
        ([("hidden_size: 64", "hidden_size: 66")], ["model.hidden_size: must be a multiple of num_attention_heads"]),
        ([("experts: 8", "experts: 8\n  moe_router_topk: 9")], ["moe_router_topk: must not be above num_experts"]),
        ([("experts: 8", "experts: 8\n  moe_router_num_groups: 3")], ["moe_router_num_groups: must divide num_experts"]),
        ([("experts: 8", "experts: 8\n  moe_token_dispatcher_type: flex")], ["must be left alone", "found: flex"]),
        ([("  num_experts: 8", "  moe_router_topk: 2")], ["moe.num_experts is missing"]),
        ([("length: 32", "length: 32\n  max_position_embeddings: 16")], ["must not be less than seq_length"]),
        ([("length: 32", "length: 32\n  bf16: true\n  fp16: true")], ["bf16 and fp16 exclude each other"]),
        ([("length: 32", "length: 32\n  num_query_groups: 2")], ["does nothing without group_query_attention"]),
        ([("size: 4", "size: 4\n  overlap_param_gather: true")], ["overlap_param_gather: needs use_distributed_optimizer"]),
        ([("lr: 1.0e-3", "lr: 1.0e-3\n  min_lr: 0.1")], ["min_lr: must not be above lr"]),
        ([("lr: 1.0e-3", "lr: 1.0e-3\n  mock_data: true\n  data_path: [x]")], ["exclude each other"]),
        ([("gpus_per_node: 2", "gpus_per_node: 0")], ["ranks_per_node: is missing, and there are no GPUs"]),
        ([("gpus_per_node: 2", "gpus_per_node: 2\n  ranks_per_node: 4")], ["each rank needs a GPU of its own"]),
    ],
)
def test_contradictions_are_refused(capsys, job_file, replacements, expected):
    said = refusal(capsys, job_file(*replacements))
    for text in expected:
        assert text in said


def test_a_plan_for_other_ranks_is_refused(capsys, job_file, tmp_path):
    save_plan(PlacementPlan.contiguous(4, 2, 8), tmp_path / "plan.json", force=False)
    said = refusal(capsys, job_file(("replicas: 4", f"plan: {tmp_path / 'plan.json'}")))
    assert "plan.json must be for the 4 ranks and 8 experts of the job\n  found: 2 ranks and 8 experts" in said


@pytest.mark.parametrize("sizes", ["first: 1, last: 1", "first: 2"])
def test_an_uneven_pipeline_may_be_given(capsys, job_file, sizes):
    uneven = re.sub(r"(first|last): (\d)", r"decoder_\1_pipeline_num_layers: \2", sizes).replace(", ", "\n  ")
    path = job_file(
        ("size: 4", f"size: 1\n  pipeline_model_parallel_size: 4\n  {uneven}"),
        ("num_layers: 4", f"num_layers: {6 if 'last' in sizes else 8}"),
        ("replicas: 4", "replicas: 0"),
    )
    assert flags_of(capsys, path)["--decoder-first-pipeline-num-layers"] == [sizes[7]]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_examples_are_consistent(capsys, path):
    assert flags_of(capsys, path)["--moe-dispatcher"] == ["scalemoe"]


@pytest.mark.parametrize("name", ["tiny_cpu", "paper_bert_64"])
def test_the_example_scripts_take_the_flags(name):
    job = load_job(ROOT / "examples" / "configs" / f"{name}.yaml")
    (script,) = PROGRAMS[job.content.program]
    assert (ROOT / script).is_file()
    arguments = ROOT / "examples" / "common" / "arguments.py"
    result = subprocess.run([sys.executable, arguments, *flag_words(job)], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_megatrons_parser_is_asked_where_there_is_one(job_file, tmp_path, monkeypatch):
    assert "no Megatron-LM" in why_unchecked(load_job(job_file()))
    (tmp_path / "megatron" / "training").mkdir(parents=True)
    job = load_job(job_file(("num_layers: 4", "num_layers: 4\n  swiglo: true"), ("nodes: 2", f"nodes: 2\n  megatron_lm_path: {tmp_path}")))
    answers = [
        subprocess.CompletedProcess([], 1, "", "Traceback\nImportError: triton"),
        subprocess.CompletedProcess([], 0, json.dumps({"problem": None, "nearest": None}), ""),
        subprocess.CompletedProcess([], 0, json.dumps({"problem": "does not know --swiglo", "nearest": "--swiglu"}), ""),
    ]
    monkeypatch.setattr(job_flags, "installed_version", lambda name: "2")
    monkeypatch.setattr(job_flags.subprocess, "run", lambda *args, **options: answers.pop(0))
    assert "ImportError: triton" in why_unchecked(job)
    assert why_unchecked(job) is None
    with pytest.raises(ScaleMoEError, match=r"yaml:5: model.swiglo: Megatron's parser: does not know --swiglo") as caught:
        why_unchecked(job)
    assert caught.value.try_ == "--swiglu?"


def test_a_parser_judges_names_types_and_choices(monkeypatch):
    pytest.importorskip("torch")
    from megatron_scalemoe.mcore.scripts.flag_check import check_words

    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.add_argument("--num-layers", type=int)
        return parser

    arguments = types.ModuleType("megatron.training.arguments")
    arguments.add_megatron_arguments = add_megatron_arguments
    monkeypatch.setitem(sys.modules, "megatron.training", types.ModuleType("megatron.training"))
    monkeypatch.setitem(sys.modules, "megatron.training.arguments", arguments)
    assert check_words(["--num-layers", "4", "--scalemoe-replicas", "2"]) == {"problem": None, "nearest": None}
    assert check_words(["--num-layer", "4"]) == {"problem": "does not know --num-layer", "nearest": "--num-layers"}
    assert "invalid int value" in check_words(["--num-layers", "four"])["problem"]


def test_megatrons_own_parser_takes_the_examples(tmp_path):
    checkout = os.environ.get("MEGATRON_LM_PATH")
    if not checkout:
        pytest.skip("MEGATRON_LM_PATH is not set: it names a checkout of Megatron-LM, tag core_v0.16.1")
    words = ["--num-no-layers", "4"]
    for path in CONFIGS:
        job = load_job(path)
        if job.content.program == "megatron_lm":
            words = [*flag_words(job), *words]
    # Together, because each start takes seconds; the one flag that it must not take shows that it has read all before it.
    command = [sys.executable, "-m", "megatron_scalemoe.mcore.scripts.flag_check", checkout]
    asked = subprocess.run(command, input=json.dumps(words), capture_output=True, text=True, timeout=240)
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout) == {"problem": "does not know --num-no-layers", "nearest": "--num-layers"}


def test_the_documented_keys_are_those_of_the_code():
    """docs/config.md has the schema in one YAML block."""
    text = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    documented = yaml.safe_load(re.search(r"```yaml\n(schema_version: 1\n.*?)```", text, re.DOTALL)[1])
    assert set(documented) - {"schema_version", "program", "base", "extra_flags"} == set(SECTIONS)
    assert set(documented["cluster"]) == set(ClusterSection.model_fields)
