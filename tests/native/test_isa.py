"""The native module itself: what it was built with, what the host can run, what happens without it."""

import os
import subprocess
import sys

import pytest
import torch

from qwenopt import native


def run_python(text, **env):
    done = subprocess.run(
        [sys.executable, "-c", text], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_build_info_names_what_was_built():
    info = native.build_info()
    assert info["cuda"] is bool(native.C().cuda_kernels())
    assert info["isas"][0] == "generic"
    assert set(native.isas()) <= set(info["isas"])
    assert info["version"]
    assert info["compiler"]


def test_best_isa_is_the_last_runnable_one():
    assert native.cpu_isa() == native.isas()[-1]
    assert native.isas()[0] == "generic"


def test_isa_agrees_with_the_operating_system():
    try:
        with open("/proc/cpuinfo") as file:
            flags = set(next(line for line in file if line.startswith("flags")).split())
    except (OSError, StopIteration):
        pytest.skip("no /proc/cpuinfo with flags here")
    needs = {
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
        "avx512bf16": {"avx512_bf16", "avx512_vnni"},
        "amx": {"amx_tile", "amx_bf16"},
    }
    best = "generic"
    for name, bits in needs.items():
        if not bits <= flags:
            break
        best = name
    assert native.cpu_isa() == best


def test_an_isa_that_cannot_run_raises(kernels):
    x = torch.zeros(4)
    bad = len(native.ISA_NAMES)
    with pytest.raises(ValueError, match=r"silu_mul: isa 5; isa must be -1 \(best\), 0 generic"):
        kernels.C.silu_mul(x.data_ptr(), x.data_ptr(), x.data_ptr(), 1, 4, 4, 4, 0, 1, bad)
    if len(native.isas()) < bad:
        with pytest.raises(ValueError, match="isa must be one the host can run"):
            kernels.C.silu_mul(x.data_ptr(), x.data_ptr(), x.data_ptr(), 1, 4, 4, 4, 0, 1, len(native.isas()))


def test_read_bandwidth_reads_every_word(kernels, isa):
    data = torch.randint(0, 1 << 40, (300_001,))
    for threads in (1, 2):
        assert kernels.C.read_bandwidth(data.data_ptr(), data.nbytes, threads, isa) == data.sum().item()


def test_peak_counts_its_work(kernels, isa):
    one, two = (kernels.C.peak_bf16(threads, 1000, isa) for threads in (1, 2))
    assert one > 0
    assert two == 2 * one


def test_one_pool_of_threads():
    """libgomp once: the module's and torch's threads are the same."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/self/maps")
    native.C()
    with open("/proc/self/maps") as file:
        pools = {line.split()[-1] for line in file if "libgomp" in line or "libiomp" in line}
    assert len(pools) <= 1, pools


def test_without_module_nothing_raises_until_it_is_used():
    text = (
        "import sys, qwenopt.native as n\n"
        "assert 'torch' not in sys.modules and 'qwenopt._C' not in sys.modules\n"
        "assert not n.available() and 'QWENOPT_NO_NATIVE' in n.why_not()\n"
        "try: n.C()\n"
        "except n.MissingNative as e: print(e)\n"
    )
    assert "unset it to use the native kernels" in run_python(text, QWENOPT_NO_NATIVE="1")
