"""The Flower client of this project.

A site that trains on rows of its own says here how to get at them: a function from the run's settings to the
rows, in place of nothing. Nothing that the server sends can name a file on a node, so this is the only way.

    import csv

    from fedpeft.engines.flower_client import Row, client_app

    def own_rows(config):
        with open("/data/reviews.csv", encoding="utf-8", newline="") as file:
            return [Row(record["text"], record["label"]) for record in csv.DictReader(file)]

    app = client_app(own_rows)

Labels are those of `config.task.chosen.labels`. Without such a function a client trains on its share of the
bundled data, or, in a simulation, of the data that the settings name.
"""

from fedpeft.engines.flower_client import client_app

app = client_app()
