import pytest

from tests.examples.forked_ranks import Server


@pytest.fixture(scope="session")
def ranks_command(tmp_path_factory):
    """What starts ranks in torchrun's place, in a second: the words before RANKS SCRIPT FLAG ..."""
    server = Server(tmp_path_factory.mktemp("ranks"))
    yield server.command
    server.close()
