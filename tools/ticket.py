"""lth-ticket show|diff|verify|union|intersect FILE...: what tickets hold and have in common."""

from lth_tf import edge

with edge.importing():
    from pathlib import Path

    import rich.console
    from absl import flags

    import lth_tf.flags
    from lth_tf import analysis, models
    from lth_tf.analysis.overlap import overlaps
    from lth_tf.errors import UserError
    from lth_tf.experiments import combine
    from lth_tf.report.ticket import overlap_table, provenance, ticket_table, verdict_of
    from lth_tf.tickets import found_in, load_ticket

COMMANDS = "show", "diff", "verify", "union", "intersect"
OUTPUT = flags.DEFINE_string("output", None, "File that union and intersect write.")


def main(command: str, *files: str) -> None:
    """Does a command with tickets, or with those of workdirs."""
    console, paths = rich.console.Console(), sum((found_in(Path(given)) for given in files), [])
    tickets = list(map(load_ticket, paths))
    if len(tickets) < (least := 1 + (command == "diff")):
        raise UserError(f"{command} takes {least} ticket(s) or more, not {len(tickets)}")
    if command == "show":
        for path, ticket in zip(paths, tickets, strict=True):
            inputs = tuple(ticket.origin["input_shape"]), ticket.origin["classes"]
            through = analysis.connected(models.plain_model(ticket.spec, *inputs, 0), ticket.mask)
            console.print(ticket_table(ticket, through, str(path)), *provenance(ticket))
    for path, ticket in zip(paths[1:], tickets[1:], strict=True):
        if command == "diff":
            found = overlaps(tickets[0].mask, ticket.mask)
            console.print(overlap_table(found, f"{paths[0]}, {path}"), verdict_of(found[""]))
    if command == "verify":
        combine.report_verified(paths, tickets, console.print)
    if command in combine.HOW:
        combine.write(command, tickets, OUTPUT.value)


def run() -> None:
    """Entry point of the console command."""
    lth_tf.flags.run(main, __doc__, COMMANDS, files=True)


if __name__ == "__main__":
    run()
