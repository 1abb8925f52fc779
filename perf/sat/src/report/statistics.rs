//! The median of few runs, and its interval.

/// Median of some values, and the interval from the lowest to the highest.
///
/// Of five runs the true median lies between the lowest and the highest with 94 % probability (1 - 2 / 2⁵), whatever
/// the distribution; of three with 75 %. No assumption is made, and no run is left out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Middle {
    /// The median.
    pub(super) median: f64,
    /// The lowest value.
    pub(super) low: f64,
    /// The highest value.
    pub(super) high: f64,
}

/// The middle of some values; none of none.
pub(super) fn middle(mut values: Vec<f64>) -> Option<Middle> {
    values.sort_by(f64::total_cmp);
    let (low, high) = (*values.first()?, *values.last()?);
    let half = values.len() / 2;
    let median = match values.len() % 2 {
        0 => f64::midpoint(*values.get(half - 1)?, *values.get(half)?),
        _ => *values.get(half)?,
    };
    Some(Middle { median, low, high })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_of_the_sorted_values() {
        let of = |values: &[f64]| middle(values.to_vec()).map(|m| (m.median, m.low, m.high));
        assert_eq!(of(&[3.0, 1.0, 2.0]), Some((2.0, 1.0, 3.0)));
        assert_eq!(of(&[4.0, 1.0]), Some((2.5, 1.0, 4.0)));
        assert_eq!(of(&[7.0]), Some((7.0, 7.0, 7.0)));
        assert_eq!(of(&[]), None);
    }
}
