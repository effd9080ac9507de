//! Charts as SVG: bars on a logarithmic axis, and lines on two.

use std::fmt::Write;

const FONT: &str = "font-family=\"sans-serif\" font-size=\"12\"";

fn open(out: &mut String, width: f64, height: f64, title: &str) {
    let _ = writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" {FONT}>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n<text x=\"10\" y=\"18\" font-weight=\"bold\">{title}</text>"
    );
}

fn text(out: &mut String, x: f64, y: f64, anchor: &str, words: &str) {
    let _ = writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{words}</text>");
}

fn line(out: &mut String, from: (f64, f64), to: (f64, f64), colour: &str) {
    let ((x1, y1), (x2, y2)) = (from, to);
    let _ = writeln!(out, "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\"/>");
}

/// A number with as many digits as it needs.
fn short(x: f64) -> String {
    if x >= 10.0 { format!("{x:.0}") } else { format!("{x:.2}").trim_end_matches('0').trim_end_matches('.').to_owned() }
}

/// Horizontal bars from 1 leftwards or rightwards: how many times faster.
#[must_use]
pub fn bars(title: &str, rows: &[(String, f64)]) -> String {
    let (width, left, right, top, step) = (760.0, 190.0, 40.0, 50.0, 18.0);
    let height = top + step * rows.len() as f64 + 20.0;
    let low = rows.iter().map(|r| r.1).fold(0.5, f64::min).log2().floor();
    let high = rows.iter().map(|r| r.1).fold(2.0, f64::max).log2().ceil();
    let x = |v: f64| left + (v.log2() - low) / (high - low) * (width - left - right);
    let mut out = String::new();
    open(&mut out, width, height, title);
    for power in low as i32..=high as i32 {
        let at = x(2f64.powi(power));
        line(&mut out, (at, top - 6.0), (at, height - 14.0), if power == 0 { "#000" } else { "#ddd" });
        text(&mut out, at, top - 12.0, "middle", &short(2f64.powi(power)));
    }
    for (i, (name, value)) in rows.iter().enumerate() {
        let y = top + step * i as f64;
        let (from, to) = if *value < 1.0 { (x(*value), x(1.0)) } else { (x(1.0), x(*value)) };
        let colour = if *value < 1.0 { "#c0392b" } else { "#2e7d5b" };
        let _ = writeln!(
            out,
            "<rect x=\"{from:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"12\" fill=\"{colour}\"/>",
            (to - from).max(1.0)
        );
        text(&mut out, left - 8.0, y + 10.0, "end", name);
        text(&mut out, to + 4.0, y + 10.0, "start", &short(*value));
    }
    out.push_str("</svg>\n");
    out
}

/// A line of a chart: its name, and points of size in KiB and time.
pub type Curve = (String, Vec<(f64, f64)>);

fn size(kib: f64) -> String {
    match kib as u64 {
        k if k >= 1 << 20 => format!("{} GiB", k >> 20),
        k if k >= 1 << 10 => format!("{} MiB", k >> 10),
        k => format!("{k} KiB"),
    }
}

/// Time against footprint, both logarithmic.
#[must_use]
pub fn curves(title: &str, unit: &str, curves: &[Curve]) -> String {
    const COLOURS: [&str; 6] = ["#2e7d5b", "#c0392b", "#2c5aa0", "#b8860b", "#7d3c98", "#555"];
    let (width, height, left, right, top, bottom) = (760.0, 420.0, 60.0, 20.0, 50.0, 40.0);
    let points = || curves.iter().flat_map(|c| c.1.iter());
    let of =
        |f: fn(&(f64, f64)) -> f64| (points().map(f).fold(f64::MAX, f64::min), points().map(f).fold(0.0, f64::max));
    let ((x0, x1), (y0, y1)) = (of(|p| p.0.log2()), of(|p| p.1));
    let (y0, y1) = (y0.max(1e-3).log10().floor(), y1.max(1e-2).log10().ceil());
    let x = |kib: f64| left + (kib.log2() - x0) / (x1 - x0).max(1.0) * (width - left - right);
    let y = |t: f64| height - bottom - (t.max(1e-3).log10() - y0) / (y1 - y0).max(1.0) * (height - top - bottom);
    let mut out = String::new();
    open(&mut out, width, height, title);
    for power in y0 as i32..=y1 as i32 {
        let at = y(10f64.powi(power));
        line(&mut out, (left, at), (width - right, at), "#ddd");
        text(&mut out, left - 6.0, at + 4.0, "end", &format!("{} {unit}", short(10f64.powi(power))));
    }
    for power in (x0 as i32..=x1 as i32).step_by(2) {
        let kib = 2f64.powi(power);
        line(&mut out, (x(kib), top), (x(kib), height - bottom), "#eee");
        text(&mut out, x(kib), height - bottom + 16.0, "middle", &size(kib));
    }
    for (i, (name, points)) in curves.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        let path: Vec<String> = points.iter().map(|&(k, t)| format!("{:.1},{:.1}", x(k), y(t))).collect();
        let _ = writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            path.join(" ")
        );
        let at = left + 10.0 + 170.0 * i as f64;
        line(&mut out, (at, 34.0), (at + 20.0, 34.0), colour);
        text(&mut out, at + 26.0, 38.0, "start", name);
    }
    out.push_str("</svg>\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn charts_hold_every_row_and_point() {
        let svg = bars("t", &[("faster".to_owned(), 4.0), ("slower".to_owned(), 0.4)]);
        assert_eq!(svg.matches("<rect x=").count(), 2);
        assert!(svg.contains("faster") && svg.contains("slower") && svg.ends_with("</svg>\n"));
        let svg = curves(
            "t",
            "ns",
            &[("a".to_owned(), vec![(4.0, 1.0), (1024.0, 30.0)]), ("b".to_owned(), vec![(4.0, 2.0)])],
        );
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert!(svg.contains("1 MiB") && !svg.contains("NaN"));
    }
}
