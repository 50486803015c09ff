"""What belongs in which kind of room: along its walls, on its tops, on its floor."""

from collections.abc import Callable

from enfilade.data import room_fixtures as fix
from enfilade.data import room_furniture as big
from enfilade.data import room_objects as small
from enfilade.data import room_seats as seats
from enfilade.data import room_shell as shell
from enfilade.data import room_wares as wares
from enfilade.data.room_materials import Materials
from enfilade.data.room_mesh import Thing

Maker = Callable[[Materials], Thing]


ROOMS = ("bedroom", "living room", "kitchen", "bathroom", "office", "dining room", "classroom")


# What stands along the walls, largest first: maker, chance of each copy, where ("wall", "middle" of a wall, "corner").
ALONG_WALLS: dict[str, list[tuple[Maker, tuple[float, ...], str]]] = {
    "bedroom": [
        (seats.bed, (1.0, 0.12), "middle"), (big.cabinet, (0.6,), "corner"), (big.dresser, (0.75, 0.2), "wall"),
        (big.desk, (0.45,), "wall"), (big.bookshelf, (0.45,), "corner"), (big.television, (0.35,), "middle"),
        (seats.armchair, (0.3,), "corner"), (wares.lamp_floor, (0.3,), "corner"), (seats.bench, (0.25,), "wall"),
        (seats.chair, (0.35,), "wall"), (big.shelves, (0.2,), "wall"), (wares.plant, (0.3,), "corner"),
    ],
    "living room": [
        (seats.sofa, (1.0, 0.45), "middle"), (big.television, (0.75,), "middle"), (shell.fireplace, (0.25,), "middle"),
        (big.piano, (0.15,), "wall"), (big.bookshelf, (0.65, 0.3), "wall"), (big.cabinet, (0.4,), "wall"),
        (seats.armchair, (0.6, 0.3), "corner"), (big.side_table, (0.5,), "corner"), (wares.lamp_floor,
        (0.6, 0.15), "corner"),
        (wares.plant, (0.6, 0.3), "corner"), (big.desk, (0.2,), "wall"), (big.shelves, (0.25,), "wall"),
        (seats.bench, (0.3,), "wall"),
    ],
    "kitchen": [
        (fix.counter, (1.0, 0.5), "wall"), (fix.refrigerator, (0.95,), "corner"), (big.cabinet, (0.35,), "wall"),
        (fix.larder, (0.4,), "wall"), (seats.chair, (0.2,), "wall"), (seats.bench, (0.3,), "wall"), (wares.plant,
        (0.2,), "corner"),
    ],
    "bathroom": [
        (fix.bathtub, (0.9,), "corner"), (fix.washbasin, (1.0, 0.15), "wall"), (fix.toilet, (0.95,), "wall"),
        (big.cabinet, (0.2,), "corner"), (fix.towel_rack, (0.35,), "wall"), (seats.bench, (0.2,), "wall"),
    ],
    "office": [
        (big.desk, (1.0, 0.8, 0.5, 0.3), "wall"), (big.bookshelf, (0.8, 0.5, 0.2), "wall"), (big.file_cabinet,
        (0.8, 0.5, 0.3), "corner"),
        (big.shelves, (0.45,), "wall"), (seats.sofa, (0.2,), "middle"), (big.cabinet, (0.35,), "wall"),
        (wares.plant, (0.4,), "corner"), (seats.chair, (0.4, 0.2), "wall"), (wares.lamp_floor, (0.15,), "corner"),
    ],
    "dining room": [
        (big.cabinet, (0.9, 0.4), "middle"), (shell.fireplace, (0.15,), "middle"), (big.dresser, (0.35,), "middle"),
        (big.bookshelf, (0.3,), "wall"), (wares.lamp_floor, (0.35,), "corner"), (wares.plant, (0.6, 0.3), "corner"),
        (seats.chair, (0.4, 0.3), "wall"), (big.piano, (0.12,), "wall"), (seats.armchair, (0.25,), "corner"),
    ],
    "classroom": [
        (big.podium, (0.5,), "middle"), (big.bookshelf, (0.5, 0.3), "wall"), (big.cabinet, (0.4,), "wall"),
        (big.television, (0.3,), "middle"),
        (big.file_cabinet, (0.4,), "corner"), (big.shelves, (0.35,), "wall"), (seats.chair, (0.4, 0.3), "wall"),
        (wares.plant, (0.2,), "corner"),
    ],
}  # fmt: skip


# What stands on a top of each use, and how many things at most.
ON_TOPS: dict[str, tuple[list[Maker], int]] = {
    "night": ([wares.lamp_table, wares.lamp_table, small.book_pile, wares.cup, wares.vase, small.paper], 2),
    "case": ([wares.vase, wares.lamp_table, small.book_pile, small.box_carton, wares.bowl, wares.vase, wares.toy,
    wares.plant, wares.bottle], 5),
    "table": ([wares.plate, wares.cup, wares.bowl, wares.vase, small.paper, small.book_pile, wares.bottle,
    wares.laptop, wares.plate], 7),
    "coffee": ([wares.bowl, small.book_pile, wares.cup, wares.vase, small.paper, wares.plate], 4),
    "desk": ([wares.monitor, wares.laptop, wares.lamp_desk, small.book_pile, small.paper, wares.cup, small.paper,
    wares.vase, small.box_carton], 6),
    "school": ([small.book_pile, small.paper, small.paper, wares.laptop, small.bag, wares.cup, wares.bottle], 4),
    "kitchen": ([wares.appliance, wares.bottle, wares.bowl, wares.cup, wares.bottle, wares.plate, wares.appliance,
    wares.vase], 6),
    "bath": ([wares.bottle, wares.cup, wares.bottle, small.towel_pile], 4),
    "rim": ([wares.bottle], 3),
    "bed": ([small.book_pile, small.clothes, small.bag, wares.laptop, wares.toy, small.towel_pile, small.paper], 2),
    "seat": ([small.bag, small.book_pile, small.clothes, wares.toy], 1),
    "box": ([small.book_pile, wares.toy, wares.bottle], 1),
    "any": ([small.book_pile], 1),
}  # fmt: skip


ONCE = {wares.lamp_table, wares.lamp_desk, wares.laptop, wares.monitor, small.clothes}  # at most one on a top


ON_FLOOR: dict[str, list[Maker]] = {
    "bedroom": [small.box_carton, small.bag, small.clothes, wares.toy, small.book_pile, wares.bin_],
    "living room": [small.box_carton, small.bag, wares.toy, small.book_pile, wares.plant],
    "kitchen": [wares.bin_, small.box_carton, small.bag],
    "bathroom": [wares.bin_, small.clothes, small.towel_pile],
    "office": [small.box_carton, small.bag, wares.bin_, small.book_pile, small.box_carton],
    "dining room": [small.bag, wares.toy, small.box_carton],
    "classroom": [small.bag, wares.bin_, small.box_carton, small.bag],
}
