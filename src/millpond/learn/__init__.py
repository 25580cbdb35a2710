"""From labelled text to a signed model: data, models, training, search, measuring, export. What is heavy loads late."""
