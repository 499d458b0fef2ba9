"""What a run sets on its machine: where float32 products are computed, and when networks learn in bfloat16."""

import pytest
import torch

from rlinf.launch import cpu, machine


@pytest.fixture(autouse=True)
def products_as_they_were():
    kept = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(kept)


@pytest.mark.parametrize("shape", [(7, 46, 256), (256, 256, 8), (512, 96, 384)])
def test_products_stay_in_float32_wherever_they_are_computed(shape):
    machine.choose_float32_products()
    rows, inner, columns = shape
    x, w = torch.randn(rows, inner, requires_grad=True), torch.randn(columns, inner, requires_grad=True)
    out = torch.nn.functional.linear(x, w)
    out.sum().backward()
    exact = x.detach().double() @ w.detach().double().T
    assert (out - exact).abs().max() / exact.abs().max() < 1e-5
    assert torch.allclose(w.grad.double(), x.detach().double().sum(0).expand(columns, -1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("error", "kept"), [(6e-7, "medium"), (4e-3, "highest")])
def test_a_processor_that_would_multiply_in_bfloat16_keeps_torchs_own_products(monkeypatch, error, kept):
    monkeypatch.setattr(machine, "_product_error", lambda: error)
    assert machine.choose_float32_products() is (kept == "medium")
    assert torch.get_float32_matmul_precision() == kept


def test_the_error_tells_bfloat16_from_float32():
    torch.set_float32_matmul_precision("highest")
    assert machine._product_error() < 0.1 * machine.FLOAT32_ERROR
    x = torch.randn(64, 64)
    rounded = x.bfloat16().float() @ x.bfloat16().float()
    exact = x.double() @ x.double()
    assert (rounded - exact).abs().max() / exact.abs().max() > 10 * machine.FLOAT32_ERROR


@pytest.mark.parametrize(
    ("precision", "device", "flags", "expected"),
    [
        ("fp32", "cpu", {"avx512_bf16"}, False),
        ("bf16", "cpu", {"avx512_bf16", "avx2"}, True),
        ("bf16", "cpu", {"amx_bf16"}, True),
        ("bf16", "cpu", {"avx2", "avx512f"}, False),
        ("bf16", "cuda", set(), True),
    ],
)
def test_networks_learn_in_bfloat16_where_it_is_asked_for_and_gains(monkeypatch, precision, device, flags, expected):
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset(flags))
    config = type("Config", (), {"actor": type("Actor", (), {"precision": precision})})
    assert machine.runs_in_bf16(config, torch.device(device)) is expected


def test_flags_are_those_of_the_first_core(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nmodel name\t: AVX9\nflags\t\t: fpu avx2 amx_bf16\n\nflags\t: other\n"
    )
    monkeypatch.setattr(cpu, "Path", lambda _: tmp_path / "cpuinfo")
    assert cpu.cpu_flags.__wrapped__() == {"fpu", "avx2", "amx_bf16"}
    monkeypatch.setattr(cpu, "Path", lambda _: tmp_path / "none")
    assert cpu.cpu_flags.__wrapped__() == frozenset()
