//! Getting a vCPU's attention from another thread, whether it executes or sleeps.
//!
//! Invariant: the attention word belongs to the `CpuState` of a vCPU that outlives its registration here; `detach` runs
//! before that state is freed, under the lock that `kick` takes.
#![allow(unsafe_code)] // the attention word lies in the state that translated code uses; other threads store to it

use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::config::Kick;

#[derive(Debug)]
struct Inner {
    /// Address of the vCPU's attention word, 0 when there is none.
    word: usize,
    /// A kick came since the last sleep ended.
    kicked: bool,
}

/// Wakes one vCPU.
#[derive(Debug)]
pub struct Waker {
    inner: Mutex<Inner>,
    condvar: Condvar,
}

impl Waker {
    /// A waker of no vCPU yet.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self { inner: Mutex::new(Inner { word: 0, kicked: false }), condvar: Condvar::new() })
    }
    /// Says whose attention to get.
    pub fn attach(&self, word: &AtomicI32) {
        self.lock().word = std::ptr::from_ref(word) as usize;
    }
    /// Forgets the vCPU.
    pub fn detach(&self) {
        self.lock().word = 0;
    }
    /// Makes the vCPU look up: out of translated code at its next block, or out of its sleep.
    pub fn kick(&self) {
        let mut inner = self.lock();
        inner.kicked = true;
        if inner.word != 0 {
            // SAFETY: `word` is the attention word of a live state; `detach` takes this lock before it is freed.
            unsafe { &*(inner.word as *const AtomicI32) }.store(-1, Ordering::Release);
        }
        self.condvar.notify_all();
    }
    /// Sleeps until a kick or for `limit`. A kick that came before counts.
    pub fn sleep(&self, limit: Duration) {
        let mut inner = self.lock();
        if !inner.kicked {
            inner = self.condvar.wait_timeout(inner, limit).unwrap_or_else(PoisonError::into_inner).0;
        }
        inner.kicked = false;
    }
    /// The kick as a function for devices and the command line.
    #[must_use]
    pub fn as_kick(self: &Arc<Self>) -> Kick {
        let waker = self.clone();
        Arc::new(move || waker.kick())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
