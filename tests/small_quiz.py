"""A small quiz with a question of each kind, for the tests of quizzes."""

SMALL = """\
# A small quiz / with a slash

## Choose one: the sign of a square

What is $(-2)^2$, and is it < 5 & > 3?

- [ ] −4

  The sign was kept.
- [x] 4

  Two signs cancel, see [the glossary](../glossary.md#rank).
- [ ] 2

  Half of a square.

## Choose all that hold: even numbers

Which are even?

- [x] 2

  It is twice one.
- [ ] 3

  It is odd.
- [x] 4

  It is twice two.
- [ ] 5

  It is odd as well.

## Give a number: a price

What does it cost?

- [ ] 1,000 GB

  You left the tax out.
- [x] 1,234.5 ± 0.5 GB

  That is the price.
- [ ] −3 ± 1 GB

  A price is not negative.
- [ ] anything else

  Add up the items.

## Put in order: getting up

Order them.

1. Wake up.

   Nothing goes before it.
2. Stand up.

   Lying down one cannot walk.
3. Walk.

   Now one can.
4. Run.

   Last.
"""
