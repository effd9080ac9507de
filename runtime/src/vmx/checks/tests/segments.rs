//! G3: the checks on guest segment registers.

use Field::*;
use twofold_arch::vmx::Field;

use super::checks;
use super::states::CROOKED;

const UNUSABLE: u64 = 1 << 16;

checks! {
    g3_guest_tr_ti "guest-tr-ti" {
        fails long: |s| s.set(GuestTrSelector, 0x44);
        passes long: |s| s.set(GuestTrSelector, 0x43);
    }
    g3_guest_ldtr_ti "guest-ldtr-ti" {
        fails long: |s| { s.ldtr(); s.or(GuestLdtrSelector, 4) };
        passes long: |s| s.ldtr();
        passes long: |s| s.set(GuestLdtrSelector, 4);
    }
    g3_guest_ss_rpl "guest-ss-rpl" {
        fails restricted: |s| s.set(GuestCsSelector, 0x13);
        passes long: |s| s.set(GuestCsSelector, 0x13);
        passes v86: |s| { s.set(GuestSsSelector, 0x2003); s.set(GuestSsBase, 0x2_0030) };
    }
    g3_guest_v86_base "guest-v86-base" {
        fails v86: |s| s.set(GuestEsBase, 0x10);
        fails v86: |s| s.or(GuestCsBase, 1);
        fails v86: |s| s.or(GuestSsBase, 1);
        fails v86: |s| s.or(GuestDsBase, 1 << 33);
        fails v86: |s| s.or(GuestFsBase, CROOKED);
        fails v86: |s| s.or(GuestGsBase, 1);
        passes long: |s| s.set(GuestDsBase, 0x12345);
    }
    g3_guest_segment_base_canonical "guest-segment-base-canonical" {
        fails long: |s| s.set(GuestTrBase, CROOKED);
        fails long: |s| s.set(GuestFsBase, CROOKED);
        fails long: |s| s.set(GuestGsBase, CROOKED);
        fails long: |s| { s.ldtr(); s.set(GuestLdtrBase, CROOKED) };
        // FS and GS count even when unusable, LDTR does not.
        fails long: |s| { s.or(GuestFsAccessRights, UNUSABLE); s.set(GuestFsBase, CROOKED) };
        passes long: |s| s.set(GuestLdtrBase, CROOKED);
        passes long: |s| s.set(GuestGsBase, 0xffff_8880_0000_0000);
    }
    g3_guest_segment_base_high "guest-segment-base-high" {
        fails long: |s| s.set(GuestCsBase, 1 << 32);
        fails long: |s| s.set(GuestSsBase, 1 << 32);
        fails pae: |s| s.set(GuestDsBase, 1 << 63);
        fails pae: |s| s.set(GuestEsBase, 1 << 32);
        passes long: |s| { s.or(GuestDsAccessRights, UNUSABLE); s.set(GuestDsBase, 1 << 32) };
        passes long: |s| s.set(GuestFsBase, 1 << 32);
    }
    g3_guest_v86_limit "guest-v86-limit" {
        fails v86: |s| s.set(GuestEsLimit, 0xfffe);
        fails v86: |s| s.set(GuestCsLimit, 0x1_ffff);
        fails v86: |s| s.set(GuestSsLimit, 0);
        fails v86: |s| s.set(GuestDsLimit, 0xffff_ffff);
        fails v86: |s| s.set(GuestFsLimit, 1);
        fails v86: |s| s.set(GuestGsLimit, 1);
    }
    g3_guest_v86_access_rights "guest-v86-access-rights" {
        fails v86: |s| s.set(GuestEsAccessRights, 0x93);
        fails v86: |s| s.set(GuestCsAccessRights, 0xfb);
        fails v86: |s| s.set(GuestSsAccessRights, 0xf7);
        fails v86: |s| s.set(GuestDsAccessRights, 0xf3 | UNUSABLE);
        fails v86: |s| s.set(GuestFsAccessRights, 0x73);
        fails v86: |s| s.set(GuestGsAccessRights, 0x80f3);
    }
    /// G3, G7: an unrestricted guest's CS may also have the type of data.
    g3_g7_guest_cs_type "guest-cs-type" {
        fails long: |s| s.set(GuestCsAccessRights, 0xa098);
        fails long: |s| s.set(GuestCsAccessRights, 0xa091);
        fails restricted: |s| s.set(GuestCsAccessRights, 0xa093);
        passes long: |s| s.set(GuestCsAccessRights, 0xa093);
        passes restricted: |s| s.set(GuestCsAccessRights, 0xa099);
        passes restricted: |s| s.set(GuestCsAccessRights, 0xa09f);
    }
    g3_guest_ss_type "guest-ss-type" {
        fails long: |s| s.set(GuestSsAccessRights, 0xc091);
        fails long: |s| s.set(GuestSsAccessRights, 0xc09b);
        passes long: |s| s.set(GuestSsAccessRights, 0xc097);
        passes long: |s| s.set(GuestSsAccessRights, 0xc091 | UNUSABLE);
    }
    g3_guest_data_type "guest-data-type" {
        fails long: |s| s.set(GuestDsAccessRights, 0xc092);
        fails long: |s| s.set(GuestEsAccessRights, 0xc099);
        fails long: |s| s.set(GuestFsAccessRights, 0xc09d);
        fails long: |s| s.set(GuestGsAccessRights, 0xc090);
        passes long: |s| s.set(GuestDsAccessRights, 0xc091);
        passes long: |s| s.set(GuestDsAccessRights, 0xc09b);
        passes long: |s| s.set(GuestDsAccessRights, 0xc092 | UNUSABLE);
    }
    g3_guest_segment_s "guest-segment-s" {
        fails long: |s| s.clear(GuestCsAccessRights, 0x10);
        fails long: |s| s.clear(GuestSsAccessRights, 0x10);
        fails long: |s| s.clear(GuestDsAccessRights, 0x10);
        fails long: |s| s.clear(GuestEsAccessRights, 0x10);
        fails long: |s| s.clear(GuestFsAccessRights, 0x10);
        fails long: |s| s.clear(GuestGsAccessRights, 0x10);
        passes long: |s| s.set(GuestGsAccessRights, UNUSABLE);
    }
    g3_guest_cs_dpl "guest-cs-dpl" {
        fails long: |s| s.set(GuestCsAccessRights, 0xa0fb);
        fails long: |s| s.set(GuestCsAccessRights, 0xa0ff);
        fails long: |s| s.set(GuestCsAccessRights, 0xa0b3);
        fails long: |s| s.set(GuestSsAccessRights, 0xc0f3);
        passes long: |s| { s.set(GuestCsAccessRights, 0xa09f); s.set(GuestSsAccessRights, 0xc0f3) };
        passes long: |s| { s.set(GuestCsAccessRights, 0xa0fb); s.set(GuestSsAccessRights, 0xc0f3) };
    }
    g3_guest_ss_dpl_rpl "guest-ss-dpl-rpl" {
        fails restricted: |s| { s.set(GuestCsAccessRights, 0xa0fb); s.set(GuestSsAccessRights, 0xc0f3) };
        // Even when unusable: the DPL is the CPL.
        fails restricted: |s| { s.set(GuestCsAccessRights, 0xa0fb); s.set(GuestSsAccessRights, 0xc0f3 | UNUSABLE) };
        passes restricted: |s| {
            s.set(GuestCsAccessRights, 0xa0fb);
            s.set(GuestSsAccessRights, 0xc0f3);
            s.set(GuestCsSelector, 0x13);
            s.set(GuestSsSelector, 0x1b)
        };
    }
    g3_g7_guest_ss_dpl_zero "guest-ss-dpl-zero" {
        fails real: |s| { s.set(GuestCsAccessRights, 0xfb); s.set(GuestSsAccessRights, 0xf3) };
        fails long: |s| { s.set(GuestCsAccessRights, 0xa093); s.set(GuestSsAccessRights, 0xc0f3) };
        passes real: |s| { s.or(GuestCr0, 1); s.set(GuestCsAccessRights, 0xfb); s.set(GuestSsAccessRights, 0xf3) };
    }
    g3_guest_data_dpl "guest-data-dpl" {
        fails restricted: |s| s.set(GuestDsSelector, 0x1b);
        fails restricted: |s| s.set(GuestEsSelector, 0x19);
        fails restricted: |s| s.set(GuestFsSelector, 0x1b);
        fails restricted: |s| s.set(GuestGsSelector, 0x1b);
        passes long: |s| s.set(GuestDsSelector, 0x1b);
        passes restricted: |s| { s.set(GuestDsSelector, 0x1b); s.set(GuestDsAccessRights, 0xc09f) };
        passes restricted: |s| { s.set(GuestDsSelector, 0x1b); s.or(GuestDsAccessRights, UNUSABLE) };
        passes restricted: |s| { s.set(GuestDsSelector, 0x1b); s.set(GuestDsAccessRights, 0xc0f3) };
    }
    g3_guest_segment_present "guest-segment-present" {
        fails long: |s| s.clear(GuestCsAccessRights, 0x80);
        fails long: |s| s.clear(GuestSsAccessRights, 0x80);
        fails long: |s| s.clear(GuestDsAccessRights, 0x80);
        fails long: |s| s.clear(GuestEsAccessRights, 0x80);
        fails long: |s| s.clear(GuestFsAccessRights, 0x80);
        fails long: |s| s.clear(GuestGsAccessRights, 0x80);
    }
    g3_guest_segment_reserved "guest-segment-reserved" {
        fails long: |s| s.or(GuestCsAccessRights, 1 << 8);
        fails long: |s| s.or(GuestSsAccessRights, 1 << 17);
        fails long: |s| s.or(GuestDsAccessRights, 1 << 11);
        fails long: |s| s.or(GuestEsAccessRights, 1 << 31);
        fails long: |s| s.or(GuestFsAccessRights, 1 << 9);
        fails long: |s| s.or(GuestGsAccessRights, 1 << 10);
        // CS counts though unusable.
        fails long: |s| s.or(GuestCsAccessRights, UNUSABLE | 1 << 8);
        passes long: |s| s.or(GuestDsAccessRights, UNUSABLE | 1 << 11);
        passes long: |s| s.or(GuestDsAccessRights, 1 << 12);
    }
    g3_guest_cs_d_and_l "guest-cs-d-and-l" {
        fails long: |s| s.or(GuestCsAccessRights, 1 << 14);
        passes pae: |s| s.or(GuestCsAccessRights, 1 << 13);
        passes long: |s| s.set(GuestCsAccessRights, 0xc09b);
    }
    g3_guest_segment_granularity "guest-segment-granularity" {
        fails long: |s| s.set(GuestCsLimit, 0xffff_fffe);
        fails long: |s| s.clear(GuestSsAccessRights, 1 << 15);
        fails long: |s| { s.clear(GuestDsAccessRights, 1 << 15); s.set(GuestDsLimit, 0x10_0000) };
        fails long: |s| s.set(GuestEsLimit, 0x7ffe);
        fails long: |s| s.set(GuestFsLimit, 0);
        fails long: |s| s.set(GuestGsLimit, 0xfff_f7ff);
        passes long: |s| s.set(GuestGsLimit, 0xfff);
        passes long: |s| { s.clear(GuestDsAccessRights, 1 << 15); s.set(GuestDsLimit, 0xf_ffff) };
        passes long: |s| { s.or(GuestDsAccessRights, UNUSABLE); s.set(GuestDsLimit, 1) };
    }
    g3_guest_tr_type "guest-tr-type" {
        fails long: |s| s.set(GuestTrAccessRights, 0x83);
        fails long: |s| s.set(GuestTrAccessRights, 0x89);
        fails pae: |s| s.set(GuestTrAccessRights, 0x81);
        passes pae: |s| s.set(GuestTrAccessRights, 0x83);
    }
    g3_guest_tr_s "guest-tr-s" {
        fails long: |s| s.or(GuestTrAccessRights, 0x10);
    }
    g3_guest_tr_present "guest-tr-present" {
        fails long: |s| s.clear(GuestTrAccessRights, 0x80);
    }
    g3_guest_tr_reserved "guest-tr-reserved" {
        fails long: |s| s.or(GuestTrAccessRights, 1 << 8);
        fails long: |s| s.or(GuestTrAccessRights, 1 << 31);
    }
    g3_guest_tr_granularity "guest-tr-granularity" {
        fails long: |s| s.or(GuestTrAccessRights, 1 << 15);
        fails long: |s| s.set(GuestTrLimit, 0x10_0fff);
        passes long: |s| { s.or(GuestTrAccessRights, 1 << 15); s.set(GuestTrLimit, 0x10_0fff) };
    }
    g3_guest_tr_unusable "guest-tr-unusable" {
        fails long: |s| s.or(GuestTrAccessRights, UNUSABLE);
    }
    g3_guest_ldtr_type "guest-ldtr-type" {
        fails long: |s| { s.ldtr(); s.set(GuestLdtrAccessRights, 0x83) };
        passes long: |s| s.set(GuestLdtrAccessRights, 0x83 | UNUSABLE);
    }
    g3_guest_ldtr_s "guest-ldtr-s" {
        fails long: |s| { s.ldtr(); s.or(GuestLdtrAccessRights, 0x10) };
    }
    g3_guest_ldtr_present "guest-ldtr-present" {
        fails v86: |s| { s.ldtr(); s.clear(GuestLdtrAccessRights, 0x80) };
    }
    g3_guest_ldtr_reserved "guest-ldtr-reserved" {
        fails long: |s| { s.ldtr(); s.or(GuestLdtrAccessRights, 1 << 17) };
        passes long: |s| s.or(GuestLdtrAccessRights, 1 << 17);
    }
    g3_guest_ldtr_granularity "guest-ldtr-granularity" {
        fails long: |s| { s.ldtr(); s.or(GuestLdtrAccessRights, 1 << 15) };
        passes long: |s| { s.ldtr(); s.set(GuestLdtrLimit, 0xf_fff0) };
    }
}
