//! Look-ahead: whether a block overwrites the arithmetic flags before anybody can see them.
//!
//! For `Options::flags_dead_at_exit`: a block all of whose flags die at a successor need not leave them behind. What then is
//! wrong at the block boundary in between is the flags that an interrupt taken just there saves; they come back
//! and are overwritten unread, so the guest's own computation is unchanged, but whoever looks at the saved image (a debugger, a
//! VM exit's guest state) sees stale ones. The caller decides whether that may be.

use twofold_arch::{CcKind, CcOp, Loc};

use crate::block::Block;
use crate::op::{Op, Ty};

/// Whether the block, as the front end made it or after the passes, sets all six flags before any op that reads them, can fault or
/// can leave.
#[must_use]
pub fn overwrites_flags(block: &Block) -> bool {
    let cc = Loc::CC_DST.0..Loc::CC_OP.0 + 4;
    // Which of DST, SRC, SRC2 have been written.
    let mut written = [false; 3];
    let fields = [Loc::CC_DST, Loc::CC_SRC, Loc::CC_SRC2];
    for op in &block.ops {
        match *op {
            Op::Put { ty: Ty::I64, loc, .. } if fields.contains(&loc) => {
                written[fields.iter().position(|&f| f == loc).unwrap_or(0)] = true;
            }
            Op::Put { ty: Ty::I32, loc: Loc::CC_OP, v } => {
                let Op::Const { imm, .. } = block.ops[v.index()] else { return false };
                let used = match CcOp(imm as u8).kind() {
                    CcKind::Flags => [false, true, false],
                    CcKind::Logic => [true, false, false],
                    CcKind::Adc | CcKind::Sbb => [true; 3],
                    _ => [true, true, false],
                };
                return used.iter().zip(&written).all(|(used, written)| !used || *written);
            }
            Op::Get { ty, loc } | Op::Put { ty, loc, .. }
                if loc.0 < cc.end && u32::from(loc.0) + ty.bytes() > u32::from(cc.start) =>
            {
                return false;
            }
            Op::Cond { .. } | Op::Flags | Op::ExitIf { .. } => return false,
            Op::Call { helper, .. } if !helper.info().keeps_state() => return false,
            _ if op.can_fault() => return false,
            _ => {}
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse::parse;

    fn check(body: &str) -> bool {
        let text = format!("block flags 0x2 retired 1\ninsn 0x0 len 1\n{body}\nend jump 0x1\n");
        overwrites_flags(&parse(&text).unwrap())
    }

    const SUB: &str = "a = get.i64 rax\nb = get.i64 rbx\nd = sub.i64 a, b\nput.i64 cc_dst, d\nput.i64 cc_src, b\nk = const.i32 0xf\nput.i32 cc_op, k";

    #[test]
    fn blocks_that_overwrite_the_flags() {
        assert!(check(SUB));
        assert!(check(
            "x = get.i64 rdi\nput.i64 rsi, x\na = get.i64 rax\nput.i64 cc_dst, a\nk = const.i32 0x17\nput.i32 cc_op, k"
        ));
    }

    #[test]
    fn blocks_that_show_them() {
        for first in
            ["c = cond.z", "f = flags", "m = get.i64 rax\nl = load.i64 m", "f = get.i32 cc_op", "h = call.cpuid"]
        {
            assert!(!check(&format!("{first}\n{SUB}")), "{first}");
        }
        assert!(!check("a = get.i64 rax"));
        // The kind uses an operand that is still the old one.
        assert!(!check("a = get.i64 rax\nput.i64 cc_dst, a\nk = const.i32 0xf\nput.i32 cc_op, k"));
        assert!(!check("k = get.i32 rax\nput.i32 cc_op, k"));
    }
}
