//! What was measured, beside what it should be.

use crate::say;

/// What is in the table at the end.
#[derive(Default)]
pub struct Table {
    rows: Vec<[String; 4]>,
    /// Hard statements that do not hold.
    pub broken: Vec<String>,
}

impl Table {
    /// A hard limit.
    pub fn hard(&mut self, what: &str, goal: &str, measured: String, holds: bool) {
        if !holds {
            self.broken.push(format!("{what} {goal}: {measured}"));
        }
        let verdict = if holds { "met" } else { "NOT MET" };
        self.rows.push([what.to_owned(), goal.to_owned(), measured, verdict.to_owned()]);
    }

    /// A goal that depends on the machine: missing it is told, and fails nothing.
    pub fn timed(&mut self, what: &str, goal: &str, measured: String, holds: bool) {
        let verdict = if holds { "met" } else { "MISSED" };
        self.rows.push([what.to_owned(), goal.to_owned(), measured, verdict.to_owned()]);
    }

    /// Prints it.
    pub fn print(&self) {
        let head = ["what", "goal", "measured", ""].map(str::to_owned);
        let all: Vec<_> = std::iter::once(&head).chain(&self.rows).collect();
        let width =
            |column: usize| all.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
        let [a, b, c, _] = [width(0), width(1), width(2), 0];
        for [what, goal, measured, verdict] in all {
            say(format!("{what:<a$}  {goal:<b$}  {measured:<c$}  {verdict}").trim_end());
        }
    }
}
