//! Invalidation: every operation that changes the address space or drops cached translations, and the choice of context.
//!
//! Place in the pipeline: the runtime calls these for MOV to CR, INVLPG, INVPCID, VMX transitions and their kin, after its own
//! operand checks, and stores the [`View`] that they return. Invariants: what the SDM says is dropped is dropped before the
//! call returns; a context's translations were all made under its shape and protection-key rights, or it is flushed when
//! it is switched to. More than asked may go only where the SDM lets a processor drop it at any time, which is everywhere.
//! Sources: SDM Vol 3A, "Invalidation of TLBs and Paging-Structure Caches"; Vol 3C, "Invalidating Cached Translation
//! Information".

use twofold_arch::LinearAddr;

use crate::context::{Context, Tags, View};
use crate::ept::EptControls;
use crate::mmu::{Mmu, check_linear, tags_of};
use crate::nested::GpaCache;
use crate::space::{AddressSpace, EptFault};
use crate::stats::{FlushCause, FlushPolicy};

/// Contexts a vCPU keeps at most.
const MAX_CONTEXTS: usize = 32;

/// EP4TAs whose guest-physical mappings a vCPU keeps at most.
const MAX_GPA_CACHES: usize = 16;

/// Which translations INVPCID names (SDM Vol 2A, "INVPCID").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Invpcid {
    /// Type 0: one address in one PCID, global pages excepted.
    Address {
        /// The PCID.
        pcid: u16,
        /// The address.
        la: LinearAddr,
    },
    /// Type 1: one PCID, global pages excepted.
    Context {
        /// The PCID.
        pcid: u16,
    },
    /// Type 2: all PCIDs, global pages too.
    AllWithGlobals,
    /// Type 3: all PCIDs, global pages excepted.
    All,
}

/// Which translations INVVPID names (SDM Vol 3C, "INVVPID").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Invvpid {
    /// Type 0: one address in one VPID.
    Address {
        /// The VPID.
        vpid: u16,
        /// The address.
        la: LinearAddr,
    },
    /// Type 1: one VPID.
    Single {
        /// The VPID.
        vpid: u16,
    },
    /// Type 2: every VPID but 0000H.
    All,
    /// Type 3: one VPID, global pages excepted.
    SingleRetainingGlobals {
        /// The VPID.
        vpid: u16,
    },
}

/// Bit 2i set where the two rights bits of key i differ.
const fn changed_keys(a: u32, b: u32) -> u32 {
    let d = a ^ b;
    (d | d >> 1) & 0x5555_5555
}

impl Mmu {
    /// Counts a flush. Under [`FlushPolicy::Full`] drops everything, and says so: there is nothing left to do then.
    fn begin_flush(&mut self, cause: FlushCause) -> bool {
        self.stats.flushes[cause as usize] += 1;
        if self.policy == FlushPolicy::Full {
            self.flush_everything();
            return true;
        }
        false
    }

    fn flush_everything(&mut self) {
        for c in &mut self.contexts {
            c.flush(true);
        }
        for c in &mut self.gpa_caches {
            c.flush();
        }
    }

    /// The guest-physical mappings for `controls`, by index: those there are, new ones, or those not used for longest, emptied.
    #[inline]
    pub(crate) fn gpa_cache(&mut self, controls: &EptControls) -> usize {
        let fits = |c: &GpaCache| c.top == controls.top && c.shape == controls.shape();
        if !self.gpa_caches.get(self.gpa_current).is_some_and(fits) {
            self.gpa_current = match self.gpa_caches.iter().position(fits) {
                Some(i) => i,
                None => self.make_gpa_cache(controls),
            };
            self.clock += 1;
            self.gpa_caches[self.gpa_current].last_used = self.clock;
        }
        self.gpa_current
    }

    #[cold]
    fn make_gpa_cache(&mut self, controls: &EptControls) -> usize {
        if self.gpa_caches.len() < MAX_GPA_CACHES {
            self.gpa_caches.push(GpaCache::new(controls));
            return self.gpa_caches.len() - 1;
        }
        let oldest = self.gpa_caches.iter().enumerate().min_by_key(|(_, c)| c.last_used).map_or(0, |(i, _)| i);
        self.gpa_caches[oldest].reuse(controls);
        oldest
    }

    /// The contexts of `vpid`: linear mappings and combined mappings of every EP4TA.
    fn of_vpid(&mut self, vpid: u16) -> impl Iterator<Item = &mut Context> {
        self.contexts.iter_mut().filter(move |c| c.tags.vpid == vpid)
    }

    /// Makes the context of `space` the current one, and fit for its shape and protection keys.
    fn switch(&mut self, space: &AddressSpace) -> View {
        let tags = tags_of(space);
        self.clock += 1;
        if self.contexts[self.current].tags != tags {
            self.stats.context_switches += 1;
            self.current = match self.contexts.iter().position(|c| c.tags == tags) {
                Some(i) => i,
                None => self.make_context(tags),
            };
        }
        let clock = self.clock;
        let context = &mut self.contexts[self.current];
        context.last_used = clock;
        let shape = space.shape();
        let stale_shape = context.shape != shape;
        let stale_keys = context.pkru_used & changed_keys(context.pkru, space.pkru) != 0
            || context.pkrs_used & changed_keys(context.pkrs, space.pkrs) != 0;
        (context.shape, context.pkru, context.pkrs) = (shape, space.pkru, space.pkrs);
        if stale_shape {
            context.flush(true);
        } else if stale_keys {
            self.stats.flushes[FlushCause::Pkru as usize] += 1;
            context.flush(true);
        }
        self.view_changed = false;
        self.view()
    }

    /// A context for `tags`: a new one, or the one not used for longest.
    fn make_context(&mut self, tags: Tags) -> usize {
        if self.contexts.len() < MAX_CONTEXTS
            && let Ok(context) = Context::new(tags, self.most_entries)
        {
            self.contexts.push(context);
            return self.contexts.len() - 1;
        }
        self.stats.flushes[FlushCause::Evicted as usize] += 1;
        let oldest = self.contexts.iter().enumerate().min_by_key(|(_, c)| c.last_used).map_or(0, |(i, _)| i);
        let context = &mut self.contexts[oldest];
        context.flush(true);
        context.shrink();
        context.tags = tags;
        oldest
    }

    /// MOV to CR3: `new` is the address space from now on. `keep` is bit 63 of the operand, when CR4.PCIDE = 1.
    pub fn mov_cr3(&mut self, new: &AddressSpace, keep: bool) -> View {
        let keep = keep && new.pcide && self.policy == FlushPolicy::Tagged;
        if !keep && !self.begin_flush(FlushCause::MovCr3) {
            let pcid = new.pcid;
            self.of_vpid(new.vpid).filter(|c| c.tags.pcid == pcid).for_each(|c| c.flush(false));
        }
        self.switch(new)
    }

    /// CR0, CR4, IA32_EFER or IA32_PKRS changed: `old` was the address space, `new` is it from now on. Drops what the
    /// change invalidates; a change of bits that do not matter here drops nothing.
    pub fn controls_changed(&mut self, old: &AddressSpace, new: &AddressSpace) -> View {
        let all = old.mode != new.mode || old.pge != new.pge || (old.pcide && !new.pcide);
        // What only changes the shape drops the current context in `switch`, and the others when they are switched to.
        if all || old.shape() != new.shape() {
            let done = self.begin_flush(FlushCause::CrBits);
            if all && !done {
                self.of_vpid(new.vpid).for_each(|c| c.flush(true));
            }
        }
        self.switch(new)
    }

    /// PKRU (or IA32_PKRS) changed to what `new` says. Cheap unless translations depend on a key whose rights changed.
    #[inline]
    pub fn set_pkru(&mut self, new: &AddressSpace) {
        let context = &mut self.contexts[self.current];
        if context.pkru_used & changed_keys(context.pkru, new.pkru) != 0
            || context.pkrs_used & changed_keys(context.pkrs, new.pkrs) != 0
        {
            self.stats.flushes[FlushCause::Pkru as usize] += 1;
            context.flush(true);
        }
        (context.pkru, context.pkrs) = (new.pkru, new.pkrs);
    }

    /// INVLPG: the page of `la` in the current PCID, and in every PCID if global.
    pub fn invlpg(&mut self, space: &AddressSpace, la: LinearAddr) {
        if self.begin_flush(FlushCause::Invlpg) {
            return;
        }
        // What is not canonical is not cached.
        let Ok(la) = check_linear(space, la) else { return };
        let pcid = space.pcid;
        self.of_vpid(space.vpid).for_each(|c| c.drop_page(la, c.tags.pcid != pcid));
    }

    /// INVPCID, operands checked by the caller.
    pub fn invpcid(&mut self, space: &AddressSpace, what: Invpcid) {
        if self.begin_flush(FlushCause::Invpcid) {
            return;
        }
        self.of_vpid(space.vpid).for_each(|c| match what {
            // Global pages may go too; that is allowed.
            Invpcid::Address { pcid, la } if c.tags.pcid == pcid => c.drop_page(la, false),
            Invpcid::Context { pcid } if c.tags.pcid == pcid => c.flush(false),
            Invpcid::AllWithGlobals => c.flush(true),
            Invpcid::All => c.flush(false),
            Invpcid::Address { .. } | Invpcid::Context { .. } => {}
        });
    }

    /// VM entry or VM exit (`cause`) to the address space `new`. Without VPIDs the transition drops the linear and
    /// combined mappings of VPID 0000H.
    pub fn vm_transition(&mut self, new: &AddressSpace, cause: FlushCause, vpid_enabled: bool) -> View {
        if (!vpid_enabled || self.policy == FlushPolicy::Full) && !self.begin_flush(cause) {
            self.of_vpid(0).for_each(|c| c.flush(true));
        }
        self.switch(new)
    }

    /// INVVPID, operands checked by the caller.
    pub fn invvpid(&mut self, what: Invvpid) {
        if self.begin_flush(FlushCause::Invvpid) {
            return;
        }
        match what {
            Invvpid::Address { vpid, la } => self.of_vpid(vpid).for_each(|c| c.drop_page(la, false)),
            Invvpid::Single { vpid } => self.of_vpid(vpid).for_each(|c| c.flush(true)),
            Invvpid::All => self.contexts.iter_mut().filter(|c| c.tags.vpid != 0).for_each(|c| c.flush(true)),
            Invvpid::SingleRetainingGlobals { vpid } => self.of_vpid(vpid).for_each(|c| c.flush(false)),
        }
    }

    /// INVEPT: guest-physical and combined mappings of one EPTP's EP4TA, or of all (`None`), for every VPID and PCID.
    pub fn invept(&mut self, eptp: Option<u64>) {
        if self.begin_flush(FlushCause::Invept) {
            return;
        }
        let one = eptp.map(|e| e & twofold_arch::paging::ADDR);
        self.contexts
            .iter_mut()
            .filter(|c| c.tags.ep4ta.is_some() && (one.is_none() || c.tags.ep4ta == one))
            .for_each(|c| c.flush(true));
        self.gpa_caches.iter_mut().filter(|c| one.is_none_or(|top| c.top == top)).for_each(GpaCache::flush);
    }

    /// An EPT fault (row E3): the guest-physical mappings of the address and the combined ones of the linear address go, in
    /// the current EP4TA. Every function here that ends in an EPT fault has called this.
    pub fn ept_fault(&mut self, space: &AddressSpace, fault: &EptFault) {
        if self.begin_flush(FlushCause::EptViolation) {
            return;
        }
        let ep4ta = space.ep4ta();
        self.gpa_caches.iter_mut().filter(|c| Some(c.top) == ep4ta).for_each(|c| c.drop_page(fault.gpa));
        if let Some(la) = fault.la {
            self.of_vpid(space.vpid).filter(|c| c.tags.ep4ta == ep4ta).for_each(|c| c.drop_page(la, false));
        }
    }

    /// The EPTP or an EPT control changed in VMX non-root operation, as by VMFUNC: `new` is the address space from now on. Drops
    /// nothing.
    pub fn switch_eptp(&mut self, new: &AddressSpace) -> View {
        self.switch(new)
    }

    /// SMI delivery: mappings of VPID 0000H go, and `new` is the address space from now on (SDM Vol 3C, "Default Treatment of
    /// SMI Delivery").
    pub fn enter_smm(&mut self, new: &AddressSpace) -> View {
        self.vm_transition(new, FlushCause::Smm, false)
    }

    /// RSM: everything goes but guest-physical mappings, and `new` is the address space from now on (SDM Vol 3C, "Default Treatment
    /// of RSM").
    pub fn leave_smm(&mut self, new: &AddressSpace) -> View {
        if !self.begin_flush(FlushCause::Smm) {
            self.contexts.iter_mut().for_each(|c| c.flush(true));
        }
        self.switch(new)
    }

    /// Reset: everything goes, and `new` is the address space from now on.
    pub fn reset(&mut self, new: &AddressSpace) -> View {
        self.begin_flush(FlushCause::Reset);
        self.flush_everything();
        self.switch(new)
    }
}
