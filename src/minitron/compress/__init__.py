"""The whole recipe: a checkpoint and a budget go in; a smaller model that was retrained, and a report, come out."""
