"""Pure planning: an immutable view of the world in, a plan out."""
