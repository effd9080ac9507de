//! IR to CLIF.
