"""The machine: what is chosen, what is said of it, and what is measured."""

import math
import os
import signal
import time

import pytest
import torch

from nanor1.run import machine
from nanor1.run.machine import (
    Interrupt,
    choose_device,
    free_memory,
    left_in_control_groups,
    matrix_rate,
    peak_flops,
    peak_memory_gib,
)

CPU = torch.device("cpu")


@pytest.fixture
def rates(monkeypatch):
    """Set what the measurement of matrix products finds, by dtype."""

    def set_rates(**rates):
        def measured(device, dtype, clock=time.perf_counter):
            set_rates.clock = clock
            return rates[str(dtype).removeprefix("torch.")]

        monkeypatch.setattr(machine, "matrix_rate", measured)

    return set_rates


def choose(*arguments):
    said = []
    return *choose_device(*arguments, said.append), "\n".join(said)


@pytest.mark.parametrize(("bf16", "chosen"), [(60e9, torch.float32), (149e9, torch.float32), (151e9, torch.bfloat16)])
def test_a_cpu_gets_bf16_weights_only_where_it_multiplies_them_clearly_faster(rates, bf16, chosen):
    rates(float32=100e9, bfloat16=bf16)
    device, dtype, said = choose("cpu", "auto")
    assert (device, dtype) == (CPU, chosen)
    assert f"float32 100, bfloat16 {bf16 / 1e9:.0f} GFLOP/s a core" in said
    assert str(chosen).removeprefix("torch.") in said
    assert rates.clock is time.process_time, "the time of other programs must not count"


def test_a_small_model_gets_fp32_on_a_cpu_whatever_it_is_good_at(rates):
    rates(float32=1.0, bfloat16=100.0)
    said = []
    assert choose_device("cpu", "auto", said.append, width=128)[1] == torch.float32
    assert "width of 128" in said[0]
    assert choose_device("cpu", "auto", said.append, width=576)[1] == torch.bfloat16


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_dtype_that_is_asked_for_is_not_measured(monkeypatch, name):
    monkeypatch.setattr(machine, "matrix_rate", lambda *_: pytest.fail("measured"))
    device, dtype, said = choose("cpu", name)
    assert dtype == getattr(torch, name) and f"dtype: {name} (asked for)" in said and "device: cpu (asked for)" in said


def test_a_device_that_is_not_there_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match="--device tpu is not to be had here .*leave it out, or use cpu"):
        choose("tpu", "auto")


def test_float16_is_refused_where_it_is_not_computed_fast():
    with pytest.raises(ValueError, match="--dtype float16 is for CUDA, and the device is cpu; use float32"):
        choose("cpu", "float16")


def test_the_matrix_rate_is_that_of_products_timed_outside_and_cheap_to_measure():
    x, w = torch.randn(128, 768), torch.randn(4 * 768, 768)
    seconds = []
    for _ in range(12):
        start_s = time.perf_counter()
        torch.nn.functional.linear(x, w)
        seconds.append(time.perf_counter() - start_s)
    outside = 2 * 128 * 4 * 768 * 768 / min(seconds)
    start_s = time.perf_counter()
    rate = matrix_rate(CPU, torch.float32)
    assert 0.2 < rate / outside < 5  # machines stall
    assert time.perf_counter() - start_s < 2


def test_the_random_numbers_of_a_run_do_not_depend_on_what_is_measured():
    before = torch.get_rng_state()
    matrix_rate(CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_peak_of_a_known_gpu_is_the_published_one_and_others_are_measured(rates, monkeypatch):
    rates(float32=1e12, bfloat16=2e12)
    cuda, said = torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_flops(cuda, torch.bfloat16, said.append) == 989e12
    assert "989 TFLOP/s: published for NVIDIA H200, bfloat16" in said[-1]
    assert peak_flops(cuda, torch.float32, said.append) == 1e12  # what is published is of tensor cores
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 NVL")  # slower, and no such name
    assert peak_flops(cuda, torch.bfloat16, said.append) == 2e12
    assert peak_flops(CPU, torch.float32, said.append) == 1e12
    assert "1 TFLOP/s: measured, float32" in said[-1]


def test_memory_is_in_the_range_of_the_machine():
    assert 0.01 < peak_memory_gib() < 1e4
    assert 2**20 < free_memory(CPU) < 2**50


def test_memory_that_no_part_of_the_system_tells_is_said_to_be_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "resource", None)  # as on Windows, where other functions tell: test_windows.py
    assert math.isnan(peak_memory_gib())
    monkeypatch.setattr(machine, "Path", lambda name: tmp_path / name.lstrip("/"))  # no /proc
    assert free_memory(CPU) > 2**28  # half of the machine's
    monkeypatch.delattr(os, "sysconf")
    assert free_memory(CPU) == 4 << 30


def write_group(folder, names, limit, used, stat):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip((*names, "memory.stat"), (limit, used, stat), strict=True):
        (folder / name).write_text(f"{text}\n")


def test_what_is_left_is_what_the_container_or_the_batch_job_has_left(tmp_path, monkeypatch):
    proc, root = tmp_path / "cgroup", tmp_path / "fs"
    assert left_in_control_groups(proc, root) == []  # no Linux, no groups

    v2 = ("memory.max", "memory.current")
    proc.write_text("0::/job/step\n")
    write_group(root / "job/step", v2, "max", 900, "anon 900")
    write_group(root / "job", v2, 1000, 900, "anon 500\nactive_file 100\ninactive_file 300\nslab 7")
    assert left_in_control_groups(proc, root) == [500]  # the job's limit holds for its step; cached files give way

    write_group(root, v2, 300, 400, "anon 400")  # a container, whose own group is the root
    proc.write_text("0::/not/seen/from/inside\n")
    assert left_in_control_groups(proc, root) == [0]

    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    proc.write_text("5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n")
    write_group(root / "memory/a", v1, 2000, 700, "active_file 1\ntotal_active_file 20\ntotal_inactive_file 3")
    (root / "memory.max").unlink()
    assert left_in_control_groups(proc, root) == [1323]

    monkeypatch.setattr(machine, "left_in_control_groups", lambda: [4321, 10**18])
    assert free_memory(CPU) == 4321


def test_an_interrupt_asks_once_and_then_lets_ctrl_c_through(capfd):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        interrupt = Interrupt()
        assert not interrupt.is_asked
        signal.raise_signal(signal.SIGINT)
        assert interrupt.is_asked and "finishing this step" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_an_interrupt_asks_also_when_nobody_reads_what_it_says(monkeypatch):
    def gone(descriptor, text):
        raise BrokenPipeError

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(os, "write", gone)
    try:
        interrupt = Interrupt()
        signal.raise_signal(signal.SIGINT)
        assert interrupt.is_asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
