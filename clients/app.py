"""The Flower client of this project.

A site that trains on rows of its own says here how to get at them: a function from the run's settings to the
rows, in place of nothing. Nothing that the server sends can name a file on a node, so this is the only way.

    from fedpeft.engines.flower_client import Row

    def own_rows(config):
        with open("/data/reviews.tsv", encoding="utf-8") as file:
            return [Row(text, label) for text, label in (line.rstrip().split("\\t") for line in file)]

    app = client_app(own_rows)

Labels are those of `config.task.chosen.labels`. Without such a function a client trains on its share of the
bundled data, or, in a simulation, of the data that the settings name.
"""

from fedpeft.engines.flower_client import client_app

app = client_app()
