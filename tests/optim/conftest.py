import pytest
from disk_folder import on_disk


@pytest.fixture
def folder(tmp_path):
    """On a disk."""
    with on_disk(tmp_path) as folder:
        yield folder
