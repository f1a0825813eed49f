"""From a raised graph to a callable: `direct` (a flat plan, no compiler) or `inductor`."""
