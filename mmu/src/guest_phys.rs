//! Guest-physical memory for helpers: translating, reading and writing by guest-physical address, and loading PDPTE registers.
//!
//! Place in the pipeline: helpers that have a guest-physical address and no linear one come here; everything else goes by
//! linear address through [`crate::mmu`]. Invariant: with EPT off, guest-physical addresses are physical addresses; with EPT on,
//! every page of an access is checked before its first byte is read or written.

use twofold_arch::{GuestPhysAddr, PAGE_SIZE, PhysAddr};

use crate::ept::EptControls;
use crate::mmu::Mmu;
use crate::nested::Nested;
use crate::space::{AccessKind, AddressSpace, EptFault, PdpteError};
use crate::walk::{Direct, load_pdptes};

impl Mmu {
    /// Where the access of `kind` to `gpa`, which is the translation of no linear address, goes.
    ///
    /// # Errors
    /// [`EptFault`], with bit 7 of the exit qualification clear.
    pub fn guest_phys(
        &mut self,
        space: &AddressSpace,
        gpa: GuestPhysAddr,
        kind: AccessKind,
    ) -> Result<PhysAddr, EptFault> {
        let Some(controls) = EptControls::of(space) else { return Ok(gpa.without_ept()) };
        let access = Nested::access(&controls, kind, None);
        let cache = self.gpa_cache(&controls);
        let memory = Direct { phys: &self.phys, code: &self.code };
        let mut nested = Nested::new(memory, controls, &mut self.gpa_caches[cache], &mut self.pml);
        nested.bypass = !self.walk_caching;
        let found = nested.find(gpa, &access);
        let counts = nested.counts;
        self.stats.count_ept(&counts);
        if let Err(fault) = &found {
            self.ept_fault(space, fault);
        }
        found.map(|page| page.place(gpa))
    }

    /// Reads `buf.len()` bytes; devices read as all ones.
    ///
    /// # Errors
    /// [`EptFault`] of the first page that refuses; `buf` is untouched then.
    pub fn guest_phys_read(
        &mut self,
        space: &AddressSpace,
        gpa: GuestPhysAddr,
        buf: &mut [u8],
    ) -> Result<(), EptFault> {
        let parts = self.guest_phys_parts(space, gpa, buf.len(), AccessKind::Read)?;
        let mut rest = buf;
        for (pa, n) in parts {
            let (here, after) = rest.split_at_mut_checked(n).unwrap_or_default();
            self.phys.read(pa, here);
            rest = after;
        }
        Ok(())
    }

    /// Writes `data`; what does not land in RAM is dropped. Whether translated code was hit, and waits in
    /// [`crate::CodePages::take_written`].
    ///
    /// # Errors
    /// [`EptFault`] of the first page that refuses; nothing is written then.
    pub fn guest_phys_write(
        &mut self,
        space: &AddressSpace,
        gpa: GuestPhysAddr,
        data: &[u8],
    ) -> Result<bool, EptFault> {
        let parts = self.guest_phys_parts(space, gpa, data.len(), AccessKind::Write)?;
        let mut rest = data;
        let mut code = false;
        for (pa, n) in parts {
            let (here, after) = rest.split_at_checked(n).unwrap_or_default();
            self.phys.write(pa, here);
            code |= self.code.note_write(pa, n as u64);
            rest = after;
        }
        Ok(code)
    }

    fn guest_phys_parts(
        &mut self,
        space: &AddressSpace,
        gpa: GuestPhysAddr,
        len: usize,
        kind: AccessKind,
    ) -> Result<Vec<(PhysAddr, usize)>, EptFault> {
        let mut parts = Vec::new();
        let mut done = 0;
        while done < len {
            let at = gpa.wrapping_add(done as u64);
            let n = (len - done).min((PAGE_SIZE - at.page_offset()) as usize);
            parts.push((self.guest_phys(space, at, kind)?, n));
            done += n;
        }
        Ok(parts)
    }

    /// The PDPTE registers that a load of CR3 with the value `cr3` gives in PAE paging, read through EPT if `space` has it
    /// (rows A2, F12).
    ///
    /// # Errors
    /// [`PdpteError`]: nothing may be loaded then.
    pub fn load_pdptes(&mut self, space: &AddressSpace, cr3: u64) -> Result<[u64; 4], PdpteError> {
        let Some(controls) = EptControls::of(space) else {
            let mut memory = Direct { phys: &self.phys, code: &self.code };
            return load_pdptes(cr3, space.maxphyaddr, &mut memory);
        };
        let cache = self.gpa_cache(&controls);
        let memory = Direct { phys: &self.phys, code: &self.code };
        let mut nested = Nested::new(memory, controls, &mut self.gpa_caches[cache], &mut self.pml).for_pdptes();
        // The entries are checked here and now: no mapping that is not in memory any more may have a say.
        nested.bypass = true;
        let r = load_pdptes(cr3, space.maxphyaddr, &mut nested);
        let counts = nested.counts;
        self.stats.count_ept(&counts);
        if let Err(PdpteError::Ept(fault)) = &r {
            self.ept_fault(space, fault);
        }
        r
    }

    /// Where `gpa` is, whatever the rights, without side effects: for debuggers and traces.
    ///
    /// # Errors
    /// [`EptFault`] when it is not mapped.
    pub fn guest_phys_probe(&self, space: &AddressSpace, gpa: GuestPhysAddr) -> Result<PhysAddr, EptFault> {
        let Some(controls) = EptControls::of(space) else { return Ok(gpa.without_ept()) };
        let access = Nested::access(&controls, AccessKind::Read, None).without_needs();
        let mut nested = Nested::peek(Direct { phys: &self.phys, code: &self.code }, controls);
        nested.find(gpa, &access).map(|page| page.place(gpa))
    }
}
