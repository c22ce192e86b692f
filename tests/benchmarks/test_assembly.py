"""Machine code read back by the compile report: what instructions do, which make a loop."""

from __future__ import annotations

import pytest

from benchmarks.gpu import assembly


def instruction(text: str) -> assembly.Instruction:
    opcode, _, operands = text.partition(" ")
    return assembly.Instruction(opcode, operands)


TO_LDS = ("global_load_lds_dwordx4 v1", "buffer_load_dword v1, s[0:3] lds")
MEANINGS = {
    "is_matrix_product": ("HMMA.16816.F32.BF16", "HGMMA.64x16x16.F32.BF16", "UTCHMMA", "v_mfma_f32_32x32x8_bf16"),
    "is_multiply_add": ("FFMA", "FFMA2", "v_fma_f32", "v_fmac_f32_e32", "v_pk_fma_f32"),
    "is_async_copy": ("LDGSTS.E.BYPASS.128", "UTMALDG.2D", "UBLKCP.S.G", *TO_LDS),
    "is_global_load": ("LDG.E.128", "LDGSTS.E.64", "global_load_dwordx2", "buffer_load_ushort", "flat_load_dword"),
    "is_spill": ("LDL.64", "STL", "scratch_load_dword", "scratch_store_dwordx4"),
    "is_popcount": ("POPC", "UPOPC", "v_bcnt_u32_b32", "s_bcnt1_i32_b64"),
}  # fmt: skip
NEITHER = ("LDS.128", "STG.E", "LDSM.16.M88.4", "IMAD.WIDE.U32", "ds_read_b128", "s_load_dwordx4", "v_mul_f32")


@pytest.mark.parametrize("meaning", MEANINGS)
def test_what_an_instruction_does(meaning):
    also = {"is_global_load": ("LDGSTS.E.BYPASS.128", *TO_LDS), "is_async_copy": ("LDGSTS.E.64",)}
    everything = {text for texts in MEANINGS.values() for text in texts} | set(NEITHER)
    found = {text for text in everything if getattr(instruction(text), meaning)}
    assert found == {*MEANINGS[meaning], *also.get(meaning, ())}


@pytest.mark.parametrize(
    "text, width",
    [
        ("LDG.E", 4), ("LDG.E.64", 8), ("LDG.E.128.STRONG.GPU", 16),
        ("LDGSTS.E.BYPASS.LTC128B.128", 16), ("LDG.E.U16", 2), ("LDG.E.U8", 1), ("LDG.E.ENL2.256", 32),
        ("buffer_load_dwordx4", 16), ("buffer_load_dword", 4), ("global_load_dwordx3", 12),
        ("global_load_ushort", 2), ("global_load_short_d16_hi", 2), ("buffer_load_ubyte", 1),
    ],
)  # fmt: skip
def test_bytes_that_an_instruction_moves(text, width):
    assert assembly.Instruction(text).width == width


def sass(*lines: str) -> str:
    """As nvdisasm prints it; what is in other sections must not be read."""
    body = [
        line if line.endswith(":") else f"        /*{16 * i:04x}*/              {line} ;"
        for i, line in enumerate(lines)
    ]
    before = (
        '\t.section\t.debug_line,"",@progbits',
        '\t.section\t.text.kernel,"ax",@progbits',
        '\t.sectioninfo\t@"X"',
        "kernel:",
    )
    after = ('\t.section\t.nv.info,"",@"SHT_CUDA_INFO"', "        /*0000*/   HMMA.1688 R0 ;")
    return "\n".join([*before, *body, *after])


def test_loops_of_sass():
    """Nested loops, the inner one with a rare part at the end of the kernel; one without products; one unreachable."""
    blocks = assembly.sass_blocks(
        sass(
            "S2R R0, SR_TID.X",
            ".L_x_0:",
            "LDG.E R1, [R2]",
            ".L_x_1:",
            "LDGSTS.E.BYPASS.128 [R3], [R4]",
            "@!P0 BRA `(.L_x_4)",
            ".L_x_2:",
            "HMMA.16816.F32.BF16 R4, R8, R12, R4",
            "@P1 BRA `(.L_x_1)",
            "BRA.U UP0, `(.L_x_0)",
            ".L_x_3:",
            "POPC R1, R1",
            "BRA P3, `(.L_x_3)",
            "@P0 EXIT",
            "STG.E [R1], R2",
            "EXIT",
            ".L_x_4:",
            "LDG.E.64 R6, [R7]",
            "BRA `(.L_x_2)",
            ".L_x_5:",
            "BRA `(.L_x_5)",
        )
    )
    (inner,) = assembly.product_loops(blocks)
    assert sorted(i.stem for i in inner) == ["BRA", "BRA", "BRA", "HMMA", "LDG", "LDGSTS"]
    assert len(assembly.loops(blocks)) == 3
    assert sum(len(block.instructions) for block in blocks) == 15


def test_ptxas_leaves_a_loop_by_call():
    """What is behind the first loop can be reached by its CALL alone; the last CALL returns."""
    blocks = assembly.sass_blocks(
        sass(
            ".L_x_0:", "LDG.E R1, [R2]", "@!P6 CALL.REL.NOINC `(.L_x_1)", "BRA `(.L_x_0)",
            ".L_x_1:", "FFMA R1, R1, R1, R1", "CALL.REL.NOINC `($function)", "@P0 BRA `(.L_x_1)", "EXIT",
        )
    )  # fmt: skip
    assert len(assembly.loops(blocks)) == 2
    (loop,) = assembly.product_loops(blocks)
    assert [i.stem for i in loop] == ["FFMA", "CALL", "BRA"]


def test_multiply_adds_beside_tensor_cores_make_no_loop_of_products():
    lines = (".L_x_0:", "FFMA R1, R1, R1, R1", "@P0 BRA `(.L_x_0)")
    assert len(assembly.product_loops(assembly.sass_blocks(sass(*lines, "EXIT")))) == 1
    assert assembly.product_loops(assembly.sass_blocks(sass(*lines, "HMMA.16816.F32 R0", "EXIT"))) == []


def test_an_indirect_branch_goes_where_its_table_says():
    """The two ways of a switch meet again in front of the loop's end."""
    blocks = assembly.sass_blocks(
        sass(
            ".L_x_0:", 'BRX R2 -0x10 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*)',
            ".L_x_1:", "HMMA.16816.F32 R0", "BRA `(.L_x_3)",
            ".L_x_2:", "FFMA R1, R1, R1, R1",
            ".L_x_3:", "@P0 BRA `(.L_x_0)", "EXIT",
        )
    )  # fmt: skip
    (loop,) = assembly.product_loops(blocks)
    assert [i.stem for i in loop] == ["BRX", "HMMA", "BRA", "FFMA", "BRA"]


def test_an_indirect_branch_without_a_table_is_refused():
    with pytest.raises(ValueError, match="assembly: an indirect branch, BRX R2"):
        assembly.sass_blocks(sass("BRX R2 -0x10", "EXIT"))


def test_every_kernel_of_a_listing():
    two = sass(".L_x_0:", "EXIT") + "\n" + sass("NOP", "EXIT").replace(".text.kernel", ".text.other")
    found = assembly.sass_kernels(two)
    assert {name: [i.stem for b in blocks for i in b.instructions] for name, blocks in found.items()} == {
        "kernel": ["EXIT"],
        "other": ["NOP", "EXIT"],
    }


PASSES = (
    ".L_x_0:", "LDS.128 R0, [R1]", "@P0 BRA `(.L_x_3)",
    ".L_x_1:", "IADD3 R1, R1, R1, R1", "@P1 BRA `(.L_x_1)", "IADD3 R1, R1, R1, R1", "LDGSTS.E.BYPASS.128 [R3], [R4]",
    ".L_x_2:", "HMMA.16816.F32 R0", "@P2 BRA `(.L_x_0)", "EXIT",
    ".L_x_3:", "LDG.E.64 R6, [R7]", "BRA `(.L_x_2)",
)  # fmt: skip


@pytest.mark.parametrize(
    "wanted, stems",
    [
        ({}, "LDS BRA LDG BRA HMMA BRA"),
        ({r"LDGSTS\..*": 1}, "LDS BRA IADD3 BRA IADD3 LDGSTS HMMA BRA"),
        ({r"LDGSTS\..*": 1, "IADD3": 3}, "LDS BRA IADD3 BRA IADD3 BRA IADD3 LDGSTS HMMA BRA"),  # twice round the inner
        ({"LDS": 1}, None),  # of 32 bits
        ({r"LDS\.128": 2}, None),  # in two passes, not in one
        ({r"LDGSTS\..*": 1, r"LDG\..*": 1}, None),
    ],
)
def test_the_shortest_pass(wanted, stems):
    blocks = assembly.sass_blocks(sass(*PASSES))
    header, body = max(assembly.loops_by_header(blocks).items(), key=lambda pair: len(pair[1]))
    found = assembly.shortest_pass(blocks, header, body, wanted)
    assert found is None if stems is None else [i.stem for i in found] == stems.split()


def test_loops_of_amd():
    text = """
kernel:
.Lfunc_begin0:
\ts_load_dwordx4 s[0:3], s[4:5], 0x0  ; a comment: v_mfma
.LBB0_1:                                ; %loop
.Ltmp3:
\t.loc\t1 5 6
\tbuffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
\ts_cbranch_scc1 .LBB0_3
\ts_branch .LBB0_2
\tv_never_reached
.LBB0_2:
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[134:135], v[66:67], v[0:15]
\ts_branch .LBB0_1
.LBB0_3:
\ts_endpgm
.Lfunc_end0:
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[134:135], v[66:67], v[0:15]
"""
    blocks = assembly.amd_blocks(text)
    (loop,) = assembly.product_loops(blocks)
    assert [i.stem for i in loop] == [
        "buffer_load_dwordx4", "s_cbranch_scc1", "s_branch", "v_mfma_f32_32x32x8_bf16", "s_branch"
    ]  # fmt: skip
    assert sum(len(block.instructions) for block in blocks) == 8
