//! x
pub struct Layout; pub struct LayoutError;
