"""Everything that touches Ray: sessions, tasks, training, tuning."""
