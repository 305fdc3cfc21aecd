"""Workers: what answers. `base` is the shape, the others are kinds; the runtime opens them by kind."""
