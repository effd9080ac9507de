//! Pages of random code in random modes with random tables: whatever a guest does, L0 stays up.
#![cfg(all(target_arch = "x86_64", not(portable_host)))]
#![allow(missing_docs)]

use twofold_runtime::config::Tier;
use twofold_tests::pages::Pages;

#[test]
fn random_machines_do_no_harm() {
    let mut pages = Pages::new(20_261_122);
    for tier in [Tier::Eval, Tier::Auto, Tier::Quick, Tier::Opt] {
        (0..30).for_each(|_| pages.step(tier));
    }
    let tally = pages.tally;
    assert_eq!(tally.machines, 120);
    assert_eq!(tally.shutdowns + tally.halted + tally.ended + tally.running, tally.machines);
    // They are not all dead on arrival.
    assert!(tally.instructions > 100 * tally.machines && tally.running > 0, "{tally:?}");
}
