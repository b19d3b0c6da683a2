"""topology.conf: switches, nodes and what is refused, by line."""

from pathlib import Path

import pytest

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.topology.discover.slurm import Switch, read_slurm

SAMPLES = Path(__file__).parent / "samples"


def read(tmp_path, text: str):
    (tmp_path / "topology.conf").write_text(text)
    return read_slurm(tmp_path / "topology.conf")


def test_a_tree_with_comments_continued_lines_and_any_case():
    fabric = read_slurm(SAMPLES / "slurm_tree.conf")
    assert fabric.switches == (
        Switch("leaf1", ("dgx001", "dgx002", "dgx003", "dgx004"), (), 25.0),
        Switch("leaf2", ("dgx005", "dgx006", "dgx007", "dgx8"), (), None),
        Switch("leaf3", ("cpu01", "cpu02", "login"), (), None),
        Switch("top", (), ("leaf1", "leaf2", "leaf3"), 50.0),
    )
    assert fabric.hosts[:2] == ("dgx001", "dgx002")
    assert len(fabric.hosts) == 11
    assert fabric.notes[0].startswith("LinkSpeed is read as Gb/s")


def test_a_backslash_joins_lines_as_they_are(tmp_path):
    assert read(tmp_path, "SwitchName=s Nodes=a[1-2],\\\nb[1-\\  \n2]\n").hosts == ("a1", "a2", "b1", "b2")


def test_slurms_yaml_form_is_refused_by_its_name(tmp_path):
    (tmp_path / "topology.yaml").write_text("- topology: tree\n")
    with pytest.raises(ScaleMoEError, match="not supported"):
        read_slurm(tmp_path / "topology.yaml")


def test_switches_come_after_their_children_whatever_the_files_order(tmp_path):
    fabric = read(tmp_path, "SwitchName=top Switches=mid\nSwitchName=mid Switches=b,a\nSwitchName=a Nodes=n2\nSwitchName=b Nodes=n1\n")
    assert [s.name for s in fabric.switches] == ["a", "b", "mid", "top"]
    assert fabric.hosts == ("n2", "n1")


def test_blocks_get_a_switch_above():
    fabric = read_slurm(SAMPLES / "slurm_block.conf")
    assert [s.name for s in fabric.switches] == ["rack1", "rack2", "rack3", "blocks"]
    assert fabric.switches[-1].switches == ("rack1", "rack2", "rack3")
    assert fabric.hosts[-1] == "r3n04"
    assert "how blocks are cabled" in fabric.notes[0]


def test_one_block_needs_none(tmp_path):
    assert [s.name for s in read(tmp_path, "BlockName=b Nodes=n[1-2]\n").switches] == ["b"]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", 1, "expected lines with SwitchName= or BlockName="),
        ("\nSwitchName=a\n", 2, "a: expected Nodes= or Switches="),
        ("SwitchName=a Nodes=n1\nSwitchName=a Nodes=n2\n", 2, "a was already described in line 1"),
        ("SwitchName=a Nodes=n1\nSwitchName=b Switches=a,c\n", 2, "switch c of b is not described"),
        ("SwitchName=a Switches=b\nSwitchName=b Switches=a\n", 1, "hang on themselves"),
        ("SwitchName=a Nodes=n1 Nodes=n2\n", 1, "Nodes stands twice"),
        ("SwitchName=a Nodes=n[1-\n", 1, "Nodes: expected a comma"),
        ("SwitchName=a Node=n1\n", 1, "unknown key in a line of SwitchName"),
        ("Nodes=n1 SwitchName=a\n", 1, "expected one of SwitchName=, BlockName=, BlockSizes= first"),
        ("SwitchName=a Nodes=n1 fast\n", 1, "expected Key=Value"),
        ("SwitchName=a->b Nodes=n1\n", 1, "name must be letters"),
        ("SwitchName=a Nodes=n1 LinkSpeed=fast\n", 1, "LinkSpeed must be a whole number"),
        ("SwitchName=a Nodes=n1\nBlockName=b Nodes=n2\n", 2, "either switches or blocks"),
        ("BlockName=blocks Nodes=n1\nBlockName=b Nodes=n2\n", 1, "a block cannot be named"),
        ("BlockName=a Nodes=n1\nBlockSizes=4,x\n", 2, "BlockSizes must be numbers"),
        ("SwitchName=a Nodes=n1,b\nSwitchName=b Nodes=n2\n", 2, "b is the name of a node too"),
        ("SwitchName=a Nodes=n[1-60000]\nSwitchName=b Nodes=m[1-60000]\n", 2, "more than 65536 nodes"),
        ("SwitchName=a \\\n  Nodes=n1 \\\n  Bad=1\n", 1, "unknown key"),
    ],
)
def test_damage_is_told_by_line(tmp_path, text, line, message):
    with pytest.raises(ScaleMoEError) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path}/topology.conf:{line}: ")
    assert message in str(caught.value)
