//! Where an input is split. Pure: no client required.
//!
//! The same input with the same limits is always split at the same places, so that nothing but a hash of them has to be
//! recorded: whoever needs them again reads the input again.

use std::fmt::Write as _;

use sha2::{Digest as _, Sha256};

use super::MAX_SHARDS;
use crate::api::{InputRange, Reason};
use crate::controller::Problem;
use crate::controller::identity::hex;

/// By what an input is split.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests in one part.
    pub max_requests: Option<i64>,
    /// Bytes in one part, as they are sent.
    pub max_bytes: i64,
    /// What came of it before, if it was split before: see [`Plan::sha256`].
    pub expected: Option<String>,
}

/// The parts of an input, in its order. No line is in two of them, and none that holds a request is in none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The parts.
    pub parts: Vec<InputRange>,
    /// SHA-256 of where they are and what is in them, in hexadecimal.
    pub sha256: String,
    /// What they were made by.
    pub limits: Limits,
}

/// The part that is being filled.
#[derive(Debug)]
struct Open {
    offset: u64,
    end: u64,
    requests: i64,
    bytes: u64,
    hash: Sha256,
}

impl Open {
    fn close(self) -> InputRange {
        InputRange {
            offset: i64::try_from(self.offset).unwrap_or(i64::MAX),
            length: i64::try_from(self.end - self.offset).unwrap_or(i64::MAX),
            requests: self.requests,
            sha256: hex(&self.hash.finalize()),
        }
    }
}

/// Splits an input while it is read.
#[derive(Debug)]
pub struct Cutter {
    limits: Limits,
    parts: Vec<InputRange>,
    open: Option<Open>,
    too_many: bool,
}

impl Cutter {
    /// Nothing was read yet.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, parts: Vec::new(), open: None, too_many: false }
    }

    /// The next line that holds a request, without spaces around it: it lies from `start` to `end`, its line break
    /// included. Says what is wrong with it if it fits into no part.
    pub fn push(&mut self, line: &str, start: u64, end: u64) -> Result<(), String> {
        let bytes = line.len() as u64 + 1;
        let most = u64::try_from(self.limits.max_bytes).unwrap_or_default();
        if bytes > most {
            return Err(format!(
                "has {bytes} bytes, and one batch may hold {most}: raise spec.sharding.maxBytes, or make the request smaller"
            ));
        }
        let full = self.open.as_ref().is_some_and(|open| {
            open.bytes + bytes > most || self.limits.max_requests.is_some_and(|most| open.requests >= most)
        });
        if full {
            self.close();
        }
        if self.open.is_none() && self.parts.len() >= MAX_SHARDS {
            self.too_many = true;
            return Ok(());
        }
        let open = self.open.get_or_insert_with(|| Open {
            offset: start,
            end,
            requests: 0,
            bytes: 0,
            hash: Sha256::new(),
        });
        open.end = end;
        open.requests += 1;
        open.bytes += bytes;
        open.hash.update(line);
        open.hash.update(b"\n");
        Ok(())
    }

    fn close(&mut self) {
        self.parts.extend(self.open.take().map(Open::close));
    }

    /// Whether it is certain already that there are too many parts, which [`Self::finish`] says.
    #[must_use]
    pub fn is_in_vain(&self) -> bool {
        self.too_many
    }

    /// The whole input was read. `source`: what messages call it.
    pub fn finish(mut self, source: &str) -> Result<Plan, Problem> {
        self.close();
        if self.too_many {
            return Err(Problem::new(
                Reason::InputTooLarge,
                format!(
                    "{source} would be split into more than {MAX_SHARDS} parts: raise spec.sharding.maxRequests or \
                     spec.sharding.maxBytes"
                ),
            ));
        }
        let mut text = String::new();
        for part in &self.parts {
            let InputRange { offset, length, requests, sha256 } = part;
            let _ = writeln!(text, "{offset} {length} {requests} {sha256}"); // writing to a String cannot fail
        }
        let sha256 = hex(&Sha256::digest(&text));
        if self.limits.expected.as_ref().is_some_and(|expected| *expected != sha256) {
            return Err(Problem::new(
                Reason::InputDiffers,
                format!(
                    "{source} is not as it was when it was split (status.shards), so no further part of it is sent: put \
                     it back as it was; or delete this job, and create new ones for what has no result"
                ),
            ));
        }
        Ok(Plan { parts: self.parts, sha256, limits: self.limits })
    }
}

/// Splits JSON Lines that were checked. `source`: what messages call them.
pub fn of_content(content: &[u8], source: &str, limits: Limits) -> Result<Plan, Problem> {
    let invalid = |what: String| Problem::new(Reason::InputInvalid, format!("{source}: {what}"));
    let text = std::str::from_utf8(content).map_err(|_| invalid("is not valid UTF-8".to_owned()))?;
    let body = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut cutter = Cutter::new(limits);
    let mut start = (text.len() - body.len()) as u64;
    for (number, line) in body.split_inclusive('\n').enumerate() {
        let end = start + line.len() as u64;
        let line = line.trim();
        if !line.is_empty() {
            cutter.push(line, start, end).map_err(|what| invalid(format!("line {} {what}", number + 1)))?;
        }
        start = end;
    }
    cutter.finish(source)
}

/// The bytes of one part; `None` if the input is shorter than that.
#[must_use]
pub fn slice<'a>(content: &'a [u8], range: &InputRange) -> Option<&'a [u8]> {
    let start = usize::try_from(range.offset).ok()?;
    let end = start.checked_add(usize::try_from(range.length).ok()?)?;
    content.get(start..end)
}

/// Of a part that is not what it has to be.
#[must_use]
pub fn differs(source: &str, range: &InputRange) -> Problem {
    Problem::new(
        Reason::InputDiffers,
        format!(
            "the {} requests from byte {} of {source} on are not those that this job was made for (SHA-256 {}), and are not \
             sent: put the input back as it was",
            range.requests, range.offset, range.sha256
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Method;
    use crate::controller::input::from_lines;
    use proptest::prelude::*;
    use serde_json::json;

    const LIMIT: u64 = 1 << 20;

    fn limits(max_requests: Option<i64>, max_bytes: i64) -> Limits {
        Limits { max_requests, max_bytes, expected: None }
    }

    fn line(key: &str) -> String {
        json!({"key": key, "request": {"contents": []}}).to_string()
    }

    #[test]
    fn too_many_parts_are_seen_at_once_and_not_at_the_end() {
        let of = |lines: usize| {
            let mut cutter = Cutter::new(limits(Some(1), 1 << 20));
            (0..lines).for_each(|n| cutter.push("x", 2 * n as u64, 2 * n as u64 + 2).unwrap());
            (cutter.is_in_vain(), cutter.finish("it"))
        };
        let (in_vain, plan) = of(MAX_SHARDS);
        assert_eq!((in_vain, plan.unwrap().parts.len()), (false, MAX_SHARDS));
        let (in_vain, refused) = of(MAX_SHARDS + 1);
        assert!(in_vain && refused.unwrap_err().message.contains("more than 1000 parts"));
    }

    #[test]
    fn parts_hold_so_many_requests_and_the_last_one_the_rest() {
        let text: String = (0..7).map(|i| line(&format!("k{i}")) + "\n").collect();
        let plan = of_content(text.as_bytes(), "x", limits(Some(3), 1 << 20)).unwrap();
        assert_eq!(plan.parts.iter().map(|p| p.requests).collect::<Vec<_>>(), [3, 3, 1]);
        assert_eq!(plan.parts[1].offset, plan.parts[0].length);
    }

    #[test]
    fn a_request_that_fits_into_no_part_is_named() {
        let text = format!("\n{}\n{}", line("a"), line("much longer than the other one"));
        let most = i64::try_from(line("a").len()).unwrap() + 1;
        let problem = of_content(text.as_bytes(), "ConfigMap in, key x", limits(None, most)).unwrap_err();
        assert!(problem.message.starts_with("ConfigMap in, key x: line 3 has"), "{}", problem.message);
        assert!(problem.message.contains("maxBytes") && !problem.message.contains("much longer"));
    }

    #[test]
    fn more_parts_than_there_may_be_are_refused() {
        let text: String = (0..=MAX_SHARDS).map(|i| line(&format!("k{i}")) + "\n").collect();
        let problem = of_content(text.as_bytes(), "x", limits(Some(1), 1 << 20)).unwrap_err();
        assert_eq!(problem.reason, Reason::InputTooLarge);
        let end = text.trim_end().rfind('\n').unwrap();
        assert_eq!(
            of_content(&text.as_bytes()[..end], "x", limits(Some(1), 1 << 20)).unwrap().parts.len(),
            MAX_SHARDS
        );
    }

    #[test]
    fn an_input_that_is_split_elsewhere_than_before_is_told() {
        let text = format!("{}\n{}\n", line("a"), line("b"));
        let before = of_content(text.as_bytes(), "x", limits(Some(1), 1 << 20)).unwrap();
        let again = |text: &str| {
            let expected = Some(before.sha256.clone());
            of_content(text.as_bytes(), "x", Limits { expected, ..limits(Some(1), 1 << 20) })
        };
        assert_eq!(again(&text).unwrap().parts, before.parts);
        for other in [format!("\n{text}"), text.replace("\"b\"", "\"c\""), format!("{text}{}", line("c"))] {
            assert_eq!(again(&other).unwrap_err().reason, Reason::InputDiffers);
        }
    }

    fn part_of_input() -> impl Strategy<Value = String> {
        prop_oneof![
            5 => "[a-z]{1,12}".prop_map(|key| line(&key)),
            1 => Just(String::new()),
            1 => Just("  \t".to_owned()),
            1 => "[a-z]{1,3}".prop_map(|key| format!("  {} \r", line(&key))),
        ]
    }

    proptest! {
        /// Whatever lies between the lines: the parts together are the whole, each within its limits, and each of them,
        /// read by itself, is what it is said to be.
        #[test]
        fn parts_are_the_whole(
            lines in prop::collection::vec(part_of_input(), 1..30),
            bom in any::<bool>(),
            last_break in any::<bool>(),
            max_requests in prop::option::of(1i64..6),
            max_bytes in 60i64..300,
        ) {
            let mut text = lines.join("\n");
            if bom { text.insert(0, '\u{feff}'); }
            if last_break { text.push('\n'); }
            let Ok(whole) = from_lines(text.as_bytes(), "x", Method::GenerateContent, LIMIT) else { return Ok(()) };
            let plan = of_content(text.as_bytes(), "x", limits(max_requests, max_bytes)).unwrap();
            prop_assert_eq!(&of_content(text.as_bytes(), "x", limits(max_requests, max_bytes)).unwrap(), &plan);
            let (mut bytes, mut keys) = (Vec::new(), Vec::new());
            for range in &plan.parts {
                let part = from_lines(slice(text.as_bytes(), range).unwrap(), "x", Method::GenerateContent, LIMIT).unwrap();
                prop_assert_eq!(&part.sha256, &range.sha256);
                prop_assert_eq!(i64::try_from(part.keys.len()).unwrap(), range.requests);
                prop_assert!(i64::try_from(part.bytes.len()).unwrap() <= max_bytes);
                prop_assert!(max_requests.is_none_or(|most| range.requests <= most));
                bytes.extend_from_slice(&part.bytes);
                keys.extend(part.keys);
            }
            prop_assert_eq!(&bytes[..], &whole.bytes[..]);
            prop_assert_eq!(keys, whole.keys);
        }

        /// A part is never less than it could be: the next line did not fit.
        #[test]
        fn no_part_is_smaller_than_it_has_to_be(count in 1usize..40, most in 1i64..9) {
            let text: String = (0..count).map(|i| line(&format!("k{i}")) + "\n").collect();
            let plan = of_content(text.as_bytes(), "x", limits(Some(most), 1 << 20)).unwrap();
            let expected = count.div_ceil(usize::try_from(most).unwrap());
            prop_assert_eq!(plan.parts.len(), expected);
        }
    }
}
