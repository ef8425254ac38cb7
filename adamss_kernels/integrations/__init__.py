"""Other libraries' models and trainers; each module imports its library, and nothing here is imported on its own."""
