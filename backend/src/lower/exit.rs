//! Lowering of every way out of a block: direct exits, jump cache, dispatcher, exceptions.

use cranelift_codegen::cursor::Cursor;
use cranelift_codegen::ir::{InstBuilder, SourceLoc, TrapCode, Value as Clif, types};
use twofold_arch::Exception;
use twofold_ir::{Exit, SideExit};

use super::{EXIT_SHIFT, Lowering, MAX_TRAPS, NAME_SLOT, Shape};
use crate::compiler::CompileError;
use crate::layout;
use crate::thunk::Thunk;

impl Lowering<'_> {
    /// Leaves when `c` is not 0.
    pub(super) fn side_exit(&mut self, c: Clif, side: SideExit) -> Result<(), CompileError> {
        let n = self.out.exits.len();
        if n < MAX_TRAPS && !matches!(side.exit, Exit::Indirect { .. }) {
            self.out.exits.push(side);
            let srcloc = self.cur.srcloc();
            self.cur.set_srcloc(SourceLoc::new(srcloc.bits() | (n as u32 + 1) << EXIT_SHIFT));
            let code = TrapCode::user(n as u8 + 1).ok_or(CompileError::Malformed)?;
            self.cur.ins().trapnz(c, code);
            self.cur.set_srcloc(srcloc);
            return Ok(());
        }
        let out = self.new_block(true);
        let next = self.new_block(false);
        self.cur.ins().brif(c, out, &[], next, &[]);
        self.cur.goto_bottom(out);
        self.exit(&side.exit, side.retired)?;
        self.cur.goto_bottom(next);
        Ok(())
    }

    /// Leaves with `retired` guest instructions complete; the cursor's block is filled after.
    pub(super) fn exit(&mut self, exit: &Exit, retired: u16) -> Result<(), CompileError> {
        let back = i64::from(self.block.retired) - i64::from(retired);
        if back != 0 {
            let b = self.load_state(types::I32, layout::BUDGET);
            let b = self.cur.ins().iadd_imm_s(b, back);
            self.store_state(b, layout::BUDGET);
        }
        let size = self.block.flags.size();
        match *exit {
            Exit::Jump { off } => {
                let slot = self.out.slots.len() as u32;
                self.out.slots.push(off);
                let f = self.function(NAME_SLOT, slot, Shape::tail(1));
                let state = self.state;
                self.cur.ins().return_call(f, &[state]);
            }
            Exit::JumpFar { off } => {
                let off = self.const64(i64::from(off) as u64);
                self.tail(Thunk::far(size), &[off]);
            }
            Exit::Indirect { rip, .. } => {
                let rip = self.get(rip)?;
                self.tail(Thunk::INDIRECT, &[rip]);
            }
            Exit::Dispatch { off } => {
                let off = self.const64(i64::from(off) as u64);
                self.tail(Thunk::dispatch(size), &[off]);
            }
            Exit::Helped => self.tail(Thunk::HELPED, &[]),
            Exit::Raise { off, exception } => {
                let word = self.const64(raise_word(off, &exception).into());
                let error = self.const64(exception.error.unwrap_or(0).into());
                let cr2 = self.const64(exception.cr2);
                self.tail(Thunk::raise(size), &[word, error, cr2]);
            }
        }
        Ok(())
    }
}

/// What the `raise` thunks take in RSI.
pub fn raise_word(off: u16, exception: &Exception) -> u32 {
    u32::from(off) | (exception.vector as u32) << 16 | u32::from(exception.error.is_some()) << 24
}
