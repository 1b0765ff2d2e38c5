"""What host memory is available: the machine's, within the limits of control groups."""

import pytest

from memkernels.offload.memory import available_memory, total_memory

GB = 1 << 30


def machine(root, cgroup, groups):
    """A machine of 64 GB available; `groups`: of each folder its files."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {64 * GB // 1024} kB\nSwapFree: 1 kB\n")
    if cgroup is not None:
        (root / "proc/self/cgroup").write_text(cgroup)
    for folder, files in groups.items():
        path = root / "sys/fs/cgroup" / folder
        path.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (path / name).write_text(f"{content}\n")
    return root


def v2(limit, used, cache=0):
    return {"memory.max": limit, "memory.current": used, "memory.stat": f"anon 5\ninactive_file {cache}\nactive_file 7"}


def v1(limit, used, cache=0):
    statistics = f"inactive_file 3\ntotal_inactive_file {cache}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": statistics}


NONE_V1 = 0x7FFFFFFFFFFFF000  # what version 1 has for no limit


@pytest.mark.parametrize(
    ("cgroup", "groups", "expected"),
    [
        pytest.param(None, {}, 64, id="no control groups"),
        pytest.param("0::/\n", {}, 64, id="files missing"),
        pytest.param("0::/job\n", {"job": v2("max", GB)}, 64, id="v2 without a limit"),
        pytest.param("0::/job\n", {"job": v2(8 * GB, 5 * GB)}, 3, id="v2"),
        pytest.param("0::/job\n", {"job": v2(8 * GB, 7 * GB, cache=4 * GB)}, 5, id="v2, its cache can be dropped"),
        pytest.param("0::/job\n", {"job": v2(8 * GB, 9 * GB)}, 0, id="v2, above its limit"),
        pytest.param("0::/a/b\n", {"a": v2(4 * GB, GB), "a/b": v2(8 * GB, 0)}, 3, id="v2, the group above"),
        pytest.param("0::/host/path\n", {"": v2(6 * GB, GB)}, 5, id="v2 in a container"),
        pytest.param("0::/job\n", {"job": v2(128 * GB, GB)}, 64, id="v2, more than there is"),
        pytest.param("4:cpu,memory:/job\n0::/\n", {"memory/job": v1(8 * GB, 6 * GB, cache=GB)}, 3, id="v1"),
        pytest.param("4:memory:/x\n", {"memory": v1(NONE_V1, GB)}, 64, id="v1 without a limit"),
        pytest.param("4:cpu:/job\n", {"memory/job": v1(GB, GB)}, 64, id="v1, another controller"),
    ],
)
def test_available_memory(tmp_path, cgroup, groups, expected):
    assert available_memory(machine(tmp_path, cgroup, groups)) == expected * GB


def test_of_this_machine():
    assert 0 < available_memory() <= total_memory()
