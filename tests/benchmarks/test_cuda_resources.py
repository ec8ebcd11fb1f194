"""The resource table of the CUDA kernels: how compilers' words are read, and one real compile."""

import pytest

from benchmarks import cuda_resources
from benchmarks.cuda_resources import (
    SOURCES,
    Kernel,
    compile_one,
    count_instructions,
    find_tool,
    read_account,
    report,
    split_name,
)

NAME = "_ZN4fssa4cuda11norm_kernelINS0_4BF16EEEvNS0_13NormArgumentsE"
ACCOUNT = f"""ptxas info    : 12 bytes gmem
ptxas info    : Compiling entry function '{NAME}' for 'sm_90a'
ptxas info    : Function properties for {NAME}
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 53 registers, used 1 barriers, 16 bytes smem, 536 bytes cmem[0]
"""
LISTING = f"""\tcode for sm_90a
\t\tFunction : {NAME}
        /*0000*/                   LDC R1, c[0x0][0x28] ;          /* 0x00000a00ff017b82 */
                                                                   /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, [R2] ;   /* 0x0000000402047981 */
        /*0020*/             @!UP1 STG.E.128 [R2], R4 ;            /* 0x0000000402047981 */
        /*0030*/              @P0 STL [R1], R4 ;                   /* 0x0000000402047981 */
"""


def kernel(**changes):
    facts = {"registers": 53, "stack": 0, "spilled": 0, "static_shared": 0, "target": "90a"}
    counts = count_instructions(LISTING)[NAME]
    del counts["STL"]
    return Kernel(*split_name(NAME), **{**facts, **changes}, instructions=counts)


def test_what_the_compiler_says_is_read():
    assert list(read_account(ACCOUNT)) == [(NAME, (53, 8, 16, 16))]


def test_instructions_are_counted_with_and_without_a_predicate():
    counts = count_instructions(LISTING)[NAME]
    assert counts == {"LDC": 1, "LDG.E.128.CONSTANT": 1, "STG.E.128": 1, "STL": 1}
    assert kernel().count("LDG.E.128") == 1
    assert kernel().count("LDG.E.12") == 0


def test_names_say_what_a_kernel_is_for():
    assert split_name(NAME) == ("norm_kernel", "bf16")
    linear = "_ZN4fssa4cuda23modulated_linear_kernelINS0_4FP16ELi4ELb1EEEvNS0_15LinearArgumentsE"
    assert split_name(linear) == ("modulated_linear_kernel", "fp16, 32 rows, tiles")
    attention = "_ZN4fssa4cuda22paged_attention_kernelINS0_4BF16ELi128ELi2EEEvNS0_18AttE"
    assert split_name(attention) == ("paged_attention_kernel", "bf16, heads 128 wide, 16 a group")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"spilled": 4}, "0 bytes of stack, 4 spilled"),
        ({"stack": 8}, "8 bytes of stack, 0 spilled"),
        ({"registers": 65}, "65 registers, too many for 1 blocks of 1024 threads"),
        ({"static_shared": 16}, "16 bytes of shared memory nobody planned"),
    ],
)
def test_what_a_kernel_may_not_take_is_a_fault(changes, fault, capsys):
    assert kernel().faults() == []
    assert kernel(**changes).faults() == [fault]
    assert report([kernel(**changes)], []) == 1
    assert fault in capsys.readouterr().err


def test_an_instruction_that_is_missing_or_unwanted_is_a_fault():
    without = kernel()
    del without.instructions["STG.E.128"]
    assert without.faults() == ["has no STG.E.128"]
    spilling = kernel()
    spilling.instructions["STL.64"] = 1
    assert spilling.faults() == ["has STL"]


def test_without_a_compiler_nothing_is_claimed(monkeypatch, capsys):
    monkeypatch.setattr(cuda_resources, "find_tool", lambda name: None)
    assert cuda_resources.main([]) == 0
    assert capsys.readouterr().out == "not compiled: there is no nvcc here\n"


@pytest.mark.parametrize("target", ["80", "90a"])
def test_a_real_compile_finds_every_kernel_of_a_file_within_its_budget(target):
    for tool in ("nvcc", "cuobjdump"):
        if find_tool(tool) is None:
            pytest.skip(f"no {tool} here")
    kernels = compile_one(SOURCES / "residual_film_rms_norm.cu", target)
    assert not isinstance(kernels, str), kernels
    assert {(one.name, one.template) for one in kernels} == {
        (name, dtype)
        for name in ("norm_kernel", "norm_shrink_kernel")
        for dtype in ("bf16", "fp16")
    }
    assert [one.faults() for one in kernels] == [[]] * 4


def test_a_warning_is_an_error(tmp_path):
    for tool in ("nvcc", "cuobjdump"):
        if find_tool(tool) is None:
            pytest.skip(f"no {tool} here")
    source = tmp_path / "unused.cu"
    source.write_text("__global__ void kernel(int* out) { int unused; *out = 1; }\n")
    told = compile_one(source, "80")
    assert isinstance(told, str)
    assert "never referenced" in told
