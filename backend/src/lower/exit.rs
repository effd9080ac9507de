//! Lowering of block entry and of every way out: the budget check, direct exits, jump cache, dispatcher, exceptions.

use cranelift_codegen::cursor::Cursor;
use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{InstBuilder, types};
use twofold_ir::Exit;

use super::{Lowering, NAME_SLOT, Shape};
use crate::compiler::CompileError;
use crate::layout;
use crate::thunks::Thunk;

impl Lowering<'_> {
    /// Charges the block's instructions to the budget; leaves when that or the attention word makes it negative.
    pub(super) fn budget_check(&mut self) {
        let n = self.block.retired;
        // Two loads of 32 bits: one of 64 would wait for the store of the block before to leave the store buffer.
        let budget = self.load_state(types::I32, layout::BUDGET);
        let left = self.cur.ins().iadd_imm_s(budget, -i64::from(n));
        self.store_state(left, layout::BUDGET);
        let attention = self.load_state(types::I32, layout::ATTENTION);
        let either = self.cur.ins().bor(left, attention);
        let stop = self.cur.ins().icmp_imm_s(IntCC::SignedLessThan, either, 0);
        let leave = self.new_block(true);
        let body = self.new_block(false);
        self.cur.ins().brif(stop, leave, &[], body, &[]);
        self.cur.goto_bottom(leave);
        let arg = self.const64(u64::from(n) << 16 | u64::from(self.block.start()));
        self.tail(Thunk::budget(self.block.flags.size()), &[arg]);
        self.cur.goto_bottom(body);
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
                let word = u64::from(off)
                    | (exception.vector as u64) << 16
                    | u64::from(exception.error.is_some()) << 24;
                let word = self.const64(word);
                let error = self.const64(exception.error.unwrap_or(0).into());
                let cr2 = self.const64(exception.cr2);
                self.tail(Thunk::raise(size), &[word, error, cr2]);
            }
        }
        Ok(())
    }
}
