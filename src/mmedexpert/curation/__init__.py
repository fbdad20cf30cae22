"""The funnel that makes a data set of records: one module a step, each record kept or dropped with a reason."""
