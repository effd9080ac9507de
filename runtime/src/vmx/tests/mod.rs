//! Tests of VMX.
