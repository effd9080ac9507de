//! CPUID tells the truth: a form whose feature is off is #UD, whatever family it belongs to.

use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic};
use twofold_arch::cpuid::{Feature, Features};
use twofold_frontend::table::lookup;

/// Forms of features that the decoder names and twofold has, with what each needs.
fn needs(name: CpuidFeature) -> Option<Feature> {
    Some(match name {
        CpuidFeature::CMOV => Feature::Cmov,
        CpuidFeature::MMX => Feature::Mmx,
        CpuidFeature::SSE => Feature::Sse,
        CpuidFeature::SSE2 => Feature::Sse2,
        CpuidFeature::SSE3 => Feature::Sse3,
        CpuidFeature::SSSE3 => Feature::Ssse3,
        CpuidFeature::SSE4_1 => Feature::Sse41,
        CpuidFeature::SSE4_2 => Feature::Sse42,
        CpuidFeature::POPCNT => Feature::Popcnt,
        CpuidFeature::MOVBE => Feature::Movbe,
        CpuidFeature::AES => Feature::Aes,
        CpuidFeature::SHA => Feature::Sha,
        CpuidFeature::BMI1 => Feature::Bmi1,
        CpuidFeature::BMI2 => Feature::Bmi2,
        CpuidFeature::ADX => Feature::Adx,
        CpuidFeature::AVX => Feature::Avx,
        CpuidFeature::AVX2 => Feature::Avx2,
        CpuidFeature::FMA => Feature::Fma,
        CpuidFeature::F16C => Feature::F16c,
        CpuidFeature::RDRAND => Feature::Rdrand,
        CpuidFeature::RDSEED => Feature::Rdseed,
        CpuidFeature::FSGSBASE => Feature::Fsgsbase,
        CpuidFeature::SMAP => Feature::Smap,
        CpuidFeature::XSAVE => Feature::Xsave,
        CpuidFeature::VMX => Feature::Vmx,
        CpuidFeature::TSC => Feature::Tsc,
        CpuidFeature::MSR => Feature::Msr,
        CpuidFeature::FXSR => Feature::Fxsr,
        CpuidFeature::CX8 => Feature::Cx8,
        CpuidFeature::CMPXCHG16B => Feature::Cx16,
        _ => return None,
    })
}

#[test]
fn a_form_needs_every_feature_the_manual_gives_it() {
    let mut seen = Features::NONE;
    for code in Code::values() {
        // Without BMI1 and LZCNT these are BSF and BSR.
        if matches!(code.mnemonic(), Mnemonic::Tzcnt | Mnemonic::Lzcnt)
            || code.op_code().encoding() == EncodingKind::EVEX
        {
            continue;
        }
        let Some(row) = lookup(code) else { continue };
        for feature in code.cpuid_features().iter().filter_map(|f| needs(*f)) {
            assert!(row.features.has(feature), "{code:?} does without {feature:?}");
            seen = seen.with(feature);
        }
    }
    assert_eq!(seen.0.count_ones(), 30);
}
