//! What no image can do to the daemon or to another's container.

mod budget;
mod fairness;
