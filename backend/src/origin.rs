//! Where host code comes from: for each piece of it the guest instruction and its part in it, for `-d out_asm`.
//!
//! Place in the pipeline: `lower` says by source locations what an instruction of Cranelift's is for, `assemble` and `region` where
//! that came to lie and what they wrote themselves. Nothing is kept unless the compiler was told to
//! ([`crate::Compiler::annotate`]).

/// Why a piece of host code is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// It does what the guest instruction does.
    Body = 0,
    /// The TLB probe of a guest memory access, and the access.
    Access = 1,
    /// What happens when the probe misses: behind the code, or in a cold block.
    Slow = 2,
    /// A way out: state that is written back, the jump.
    Exit = 3,
    /// The look at the budget and the attention word on an edge that closes a cycle, and leaving for it.
    Budget = 4,
    /// The entry check, and what is loaded before the first instruction.
    Entry = 5,
    /// A subroutine that several instructions call.
    Shared = 6,
    /// The compiler's own: frame, moves, spills, and what its optimiser made anew.
    Between = 7,
    /// Constants, and padding.
    Data = 8,
}

impl Role {
    const ALL: [Role; 9] = [
        Role::Body,
        Role::Access,
        Role::Slow,
        Role::Exit,
        Role::Budget,
        Role::Entry,
        Role::Shared,
        Role::Between,
        Role::Data,
    ];

    /// What a person calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Role::Body => "body",
            Role::Access => "memory access",
            Role::Slow => "slow path",
            Role::Exit => "exit",
            Role::Budget => "budget check",
            Role::Entry => "entry",
            Role::Shared => "subroutine",
            Role::Between => "compiler's own (~)",
            Role::Data => "constants",
        }
    }
    /// The source location of code with this role that belongs to guest instruction `site` of a region.
    pub(crate) fn location(self, site: u32) -> u32 {
        site & 0xffff | (self as u32) << 16
    }
    /// The role in a source location of a region.
    pub(crate) fn of_location(bits: u32) -> Role {
        Role::ALL.get((bits >> 16) as usize).copied().unwrap_or(Role::Between)
    }
}

/// Host code from an offset on, up to the next entry's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Origin {
    pub at: u32,
    pub role: Role,
    /// Index of the block, 0 but in regions, and of the guest instruction in it.
    pub insn: (u16, u16),
}

/// A list of origins that is being made; empty and free of cost unless it is wanted.
#[derive(Debug, Default)]
pub(crate) struct Origins {
    pub list: Vec<Origin>,
    pub wanted: bool,
}

impl Origins {
    /// From offset `at` on.
    pub fn mark(&mut self, at: usize, role: Role, insn: (u16, u16)) {
        if !self.wanted {
            return;
        }
        let at = at as u32;
        // Nothing lies between the last mark and this one.
        while self.list.last().is_some_and(|o| o.at >= at) {
            self.list.pop();
        }
        if self.list.last().is_none_or(|o| (o.role, o.insn) != (role, insn)) {
            self.list.push(Origin { at, role, insn });
        }
    }

    /// Code `from..to` of Cranelift's has come to lie at `at`; `what` tells of a source location what it is.
    pub fn copied(
        &mut self,
        (from, to): (usize, usize),
        at: usize,
        locations: &[(u32, u32, u32)],
        what: impl Fn(u32) -> (Role, (u16, u16)),
    ) {
        if !self.wanted || from >= to {
            return;
        }
        let last = locations.last().map_or(0, |l| l.1 as usize);
        let mut done = from;
        for &(start, end, bits) in locations {
            let (start, end) = ((start as usize).max(done), (end as usize).min(to));
            if start >= end {
                continue;
            }
            if start > done {
                self.mark(at + done - from, Role::Between, (0, 0));
            }
            let (role, insn) = what(bits);
            self.mark(at + start - from, role, insn);
            done = end;
        }
        if done < to {
            let role = if done >= last { Role::Data } else { Role::Between };
            self.mark(at + done - from, role, (0, 0));
        }
    }
}
