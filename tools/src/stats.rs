//! `twofold stats`: a `--stats` file for a person.
//!
//! Place in the pipeline: reads what a run wrote; knows only the schema.

use std::fmt::Write;
use std::path::Path;

use serde_json::Value;

/// The schema this reads; keys are only ever added to it.
const SCHEMA: &str = "twofold-stats/1";

/// The file as text.
///
/// # Errors
/// One line: the file cannot be read or is not a statistics file.
pub fn show(path: &Path) -> Result<String, String> {
    let name = path.display();
    let text = std::fs::read_to_string(path).map_err(|e| format!("{name}: cannot be read: {e}; check the path"))?;
    let value: Value = serde_json::from_str(&text)
        .map_err(|e| format!("{name}: not JSON ({e}); give a file that 'twofold run --stats' wrote"))?;
    match value.get("schema").and_then(Value::as_str) {
        Some(SCHEMA) => {}
        _ => return Err(format!("{name}: the schema is not {SCHEMA}; give a file that 'twofold run --stats' wrote")),
    }
    let mut out = String::new();
    list(&mut out, "", &value);
    Ok(out)
}

fn list(out: &mut String, prefix: &str, value: &Value) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                list(out, &name, value);
            }
        }
        Value::Array(items) => items.iter().enumerate().for_each(|(i, v)| list(out, &format!("{prefix}[{i}]"), v)),
        other => {
            let _ = writeln!(out, "{prefix:<40} {other}");
        }
    }
}
