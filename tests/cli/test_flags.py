"""`scalemoe flags` as a user meets it: the flags of a job's file, where each comes from, and what is refused."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_scalemoe.cli.main import main
from megatron_scalemoe.job.checks import check_job
from megatron_scalemoe.job.config import load_job
from megatron_scalemoe.job.flags import flag_words
from megatron_scalemoe.job.options import COUNT, DEFAULTS, PROGRAMS, REQUIRED, SECTIONS, fits, flag_of
from megatron_scalemoe.plan.placement_plan import PlacementPlan, save_plan

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
PARSER = Path(__file__).with_name("megatron_parser.py")

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
    path = job_file(("num_experts: 8", "num_experts: 8\n  moe_layer_freq: ([0]*1+[1]*3)"), ("lr: 1.0e-3", "lr: 1.0e-3\n  mock_data: true"))
    assert main(["flags", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "--num-layers 4" in lines
    assert "--mock-data" in lines
    assert "--moe-layer-freq '([0]*1+[1]*3)'" in lines
    assert "--scalemoe-replicas 4" in lines
    command = ["bash", "-c", 'eval "flags=($(cat))"; printf \'%s\\n\' "${#flags[@]}"']
    shell = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, timeout=30)
    assert int(shell.stdout) == len([word for line in lines for word in shlex.split(line)])


def test_adds_defaults_and_what_follows(capsys, job_file):
    flags = flags_of(capsys, job_file())
    assert flags["--moe-dispatcher"] == ["scalemoe"]
    assert flags["--moe-token-dispatcher-type"] == ["alltoall"]  # pretrain_gpt.py's own default is allgather
    assert flags["--max-position-embeddings"] == ["32"]
    assert flags["--tensor-model-parallel-size"] == ["1"]
    assert flags["--exit-signal-handler"] == []
    assert "--sequence-parallel" not in flags
    assert not any("cluster" in flag or "nodes" in flag for flag in flags)


def test_tensor_parallel_experts_get_sequence_parallelism(capsys, job_file):
    path = job_file(
        ("expert_model_parallel_size: 4", "{expert_model_parallel_size: 2, tensor_model_parallel_size: 2}"), ("parallel:\n  ", "parallel: ")
    )
    assert flags_of(capsys, path)["--sequence-parallel"] == []


def test_stock_leaves_our_flags_out(capsys, job_file):
    flags = flags_of(capsys, job_file(("num_experts: 8", "num_experts: 8\n  moe_dispatcher: stock")))
    assert flags["--moe-dispatcher"] == ["stock"]
    assert not [flag for flag in flags if flag.startswith("--scalemoe")]


def test_without_a_scalemoe_section_the_job_is_stock(capsys, job_file):
    assert flags_of(capsys, job_file(("scalemoe:\n  replicas: 4\n", "")))["--moe-dispatcher"] == ["stock"]


def test_an_empty_scalemoe_section_is_enough(capsys, job_file):
    assert flags_of(capsys, job_file(("scalemoe:\n  replicas: 4\n", "scalemoe:\n")))["--moe-dispatcher"] == ["scalemoe"]


def test_every_value_says_where_it_comes_from(capsys, job_file):
    path = job_file()
    assert main(["flags", str(path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    by_flag = {row["flag"] or f"{row['section']}.{row['option']}": row for row in result["values"]}
    assert (by_flag["--num-layers"]["origin"], by_flag["--num-layers"]["from"]) == ("file", f"{path}:4")
    assert by_flag["cluster.gpus_per_node"]["from"] == f"{path}:20"
    assert (by_flag["--pipeline-model-parallel-size"]["value"], by_flag["--pipeline-model-parallel-size"]["origin"]) == (1, "default")
    assert (by_flag["--max-position-embeddings"]["origin"], by_flag["--max-position-embeddings"]["from"]) == ("derived", "seq_length")
    assert result["follows"] == {"ranks": 4, "data_parallel_size": 4, "micro_batches": 4, "experts_per_rank": 2}
    assert set(result["flags"]) >= {"--num-layers", "4", "--lr", "0.001"}
    assert main(["flags", str(path), "--explain"]) == 0
    explained = capsys.readouterr().out
    assert re.search(rf"--num-layers +4 +{re.escape(str(path))}:4\n", explained)
    assert re.search(r"--tensor-model-parallel-size +1 +default\n", explained)
    assert re.search(r"ranks +4\n", explained)


def test_a_base_comes_first_and_null_takes_back(capsys, job_file):
    job_file(name="base.yaml")
    child = job_file(name="child.yaml", text="schema_version: 1\nbase: base.yaml\nmoe: {num_experts: 16}\nscalemoe: {replicas: null}\n")
    flags = flags_of(capsys, child)
    assert flags["--num-experts"] == ["16"]
    assert flags["--num-layers"] == ["4"]
    assert "--scalemoe-replicas" not in flags
    assert main(["flags", str(child), "--explain"]) == 0
    explained = capsys.readouterr().out
    assert f"{child}:3" in explained
    assert f"{child.with_name('base.yaml')}:4" in explained


def test_files_must_not_be_each_others_base(capsys, job_file):
    job_file(name="a.yaml", text="schema_version: 1\nbase: b.yaml\n")
    said = refusal(capsys, job_file(name="b.yaml", text="schema_version: 1\nbase: a.yaml\n"))
    assert "each other's base" in said


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("num_layers: 4", "num_layer: 4", [":4: model.num_layer: unknown option", "try:   model.num_layers?"]),
        ("num_layers: 4", "num_experts: 8", [":4: model.num_experts: unknown option", "try:   moe.num_experts"]),
        ("num_layers: 4", "--num-layers: 4", [":4: model.--num-layers: unknown option", "try:   model.num_layers"]),
        ("  replicas: 4", "  replica: 4", [":17: scalemoe.replica: unknown option", "try:   scalemoe.replicas?"]),
        ("training:", "trainig:", [":12: trainig: unknown field", "try:   training? One of"]),
        ("num_layers: 4", "num_layers: '4'", ["must be an integer, 1 or more", "found: '4'", "try:   no quotes"]),
        ("num_layers: 4", "num_layers: 0", ["must be an integer, 1 or more"]),
        ("num_layers: 4", "num_layers: true", ["must be an integer"]),
        ("lr: 1.0e-3", "lr: 1e-3", [":15: training.lr: must be a number", "YAML reads 1e-4 as text"]),
        ("nodes: 2", "nodes: 2\n  time: 24:00:00", ["cluster.time: must be text", "found: 86400", "try:   quotes"]),
        ("nodes: 2", "nodes: 2\n  environment: conda", ["must be one of venv, pyxis, apptainer"]),
        ("  num_layers: 4\n", "", ["model.num_layers must be given"]),
        ("program: megatron_lm", "program: megatron", ["program: must be one of megatron_lm, gpt_moe, bert_moe"]),
        ("program: megatron_lm\n", "", ["'program' is missing"]),
        ("schema_version: 1", "schema_version: 2", ["schema_version: must be 1"]),
        ("schema_version: 1", "schema_version: 1\nextra_flags: [--lr=1]", ["--lr=1 has a section", "try:   training: {lr: ...}"]),
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


@pytest.mark.parametrize("experts", [32, 64, 128])
@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_the_papers_settings(kind, experts):
    job = load_job(ROOT / "examples" / "configs" / f"paper_{kind}_{experts}.yaml")
    model = [job.get("model", name) for name in ("hidden_size", "num_layers", "seq_length")]
    assert (model, job.get("moe", "num_experts"), job.get("moe", "moe_router_topk")) == ([768, 12, 128], experts, 2)
    assert job.get("training", "global_batch_size") == 512
    assert check_job(job)["ranks"] == 32
    assert job.program == ("megatron_lm" if kind == "gpt" else "bert_moe")


@pytest.mark.parametrize("path", [path for path in CONFIGS if load_job(path).program != "megatron_lm"], ids=lambda path: path.stem)
def test_the_example_scripts_take_the_flags(path):
    job = load_job(path)
    (script,) = PROGRAMS[job.program]
    assert (ROOT / script).is_file()
    arguments = ROOT / "examples" / "common" / "arguments.py"
    result = subprocess.run([sys.executable, arguments, *flag_words(job)], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_defaults_and_required_options_exist_and_fit():
    for section, option in (*DEFAULTS, *REQUIRED):
        assert option in SECTIONS[section]
    assert all(fits(value, SECTIONS[section][option]) for (section, option), value in DEFAULTS.items())


def test_no_flag_stands_in_two_sections():
    flags = [flag_of(section, option) for section, options in SECTIONS.items() for option in options if section != "cluster"]
    assert len(flags) == len(set(flags))


def as_json(kind):
    """A kind for the process that has Megatron's parser."""
    if isinstance(kind, list):
        return {"each": as_json(kind[0])}
    return kind if isinstance(kind, (tuple, str)) else kind.__name__


def test_megatrons_own_parser_takes_all_of_it():
    checkout = os.environ.get("MEGATRON_LM_PATH")
    if not checkout:
        pytest.skip("MEGATRON_LM_PATH is not set: it names a checkout of Megatron-LM, tag core_v0.16.1")
    sections = ("model", "parallel", "moe", "training")
    flags = {flag_of(s, option): as_json(kind) for s in sections for option, kind in SECTIONS[s].items() if option != "moe_dispatcher"}
    jobs = {path.stem: load_job(path) for path in CONFIGS}
    asked = {name: [flag_words(job), check_job(job)["ranks"]] for name, job in jobs.items() if job.program == "megatron_lm"}
    asked["refused"] = [["--num-layers", "1"], 1]
    question = json.dumps({"flags": {**flags, "--no-such-flag": COUNT, "--lr": "int"}, "jobs": asked})
    result = subprocess.run([sys.executable, PARSER, checkout], input=question, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    # Three that it must not take show that it looks.
    assert answer["flags"].pop("--no-such-flag") == "no such flag"
    assert answer["flags"].pop("--lr") == "is of type float"
    assert "AssertionError" in answer["jobs"].pop("refused")
    assert {flag: said for flag, said in answer["flags"].items() if said} == {}
    assert {name: said for name, said in answer["jobs"].items() if said} == {}


def test_the_documented_keys_are_those_of_the_code():
    """docs/config.md has the schema in one YAML block."""
    text = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    block = re.search(r"```yaml\n(schema_version: 1\n.*?)```", text, re.DOTALL)[1]
    documented = yaml.safe_load(block)
    assert set(documented) - {"schema_version", "program", "base", "extra_flags"} == set(SECTIONS)
    for section in SECTIONS:
        assert set(documented[section]) <= set(SECTIONS[section])
    assert set(documented["cluster"]) == set(SECTIONS["cluster"])
