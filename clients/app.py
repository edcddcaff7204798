"""The Flower client of this project.

A site's rows, its limits and what it requires of a run stand in its node file, which `FEDPEFT_NODE` names
(`docs/nodes.md`); nothing that the server sends can name a file on a node. A site whose rows are in no file that
can be named there says here how to get at them, by a function from the run's settings to the rows, in place of
nothing. Such a function wins over the file.

    import csv

    from fedpeft.engines.flower_client import Row, client_app

    def own_rows(config):
        with open("/data/reviews.csv", encoding="utf-8", newline="") as file:
            return [Row(record["text"], record["label"]) for record in csv.DictReader(file)]

    app = client_app(own_rows)

Labels are those of `config.task.chosen.labels`. A task that reads more than a text and a label finds it in the
row's fields, by the role that the settings name: `Row(question, fields={"answer": answer})` for `causal_lm`,
`Row(" ".join(words), fields={"words": words, "tags": tags})` for `token_classification`. Without such a function a
client trains on its share of the bundled data, or, in a simulation, of the data that the settings name.

A site may also have a task of its own, as long as it is for the head that the run's task has. A task is a named
tuple of functions (`fedpeft.tasks.Task` says what each does), so a site changes the ones that it must:

    from fedpeft.engines.flower_client import client_app, task_of

    def own_task(config):
        task = task_of(config)
        return task._replace(loss=lambda model, batch: 2 * task.loss(model, batch))

    app = client_app(own_rows, own_task)
"""

from fedpeft.engines.flower_client import client_app

app = client_app()
