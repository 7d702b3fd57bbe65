//! Lanes, driven by hand.

use super::super::FailureReason;
use super::*;
use crate::config::RecordKey;

const MS: Duration = Duration::from_millis(1);

/// What each event counts for.
const BYTES: u64 = 300;

/// A lane, driven by hand. Its events are numbered.
struct Driver {
    lanes: Lanes,
    lane: LaneId,
    now: Instant,
    parked: Vec<ToPark>,
}

impl Driver {
    fn new() -> Driver {
        Driver::with(false)
    }

    fn with(exactly_once: bool) -> Driver {
        let limits = RetryLimits {
            delay_min: 10 * MS,
            delay_max: 80 * MS,
            topic_grace: 1000 * MS,
            topic_propagation: 400 * MS,
            exactly_once,
        };
        let mut lanes = Lanes::new(limits, 1);
        let lane = lanes.route(&Router::new("%s", RecordKey::None), "t").unwrap();
        Driver { lanes, lane, now: Instant::now(), parked: Vec::new() }
    }

    fn send(&mut self, count: u32) {
        (0..count).for_each(|number| self.lanes.sent(self.lane, event(number), BYTES, self.now));
    }

    fn delivered(&mut self) {
        self.lanes.delivered(self.lane, event(0), BYTES, self.now, &mut self.parked);
    }

    fn failed(&mut self, number: u32, reason: FailureReason) {
        self.lanes.failed(self.lane, event(number), BYTES, Failure::of(reason), self.now, &mut self.parked);
    }

    /// The numbers of the next round, which is sent; empty when none is due.
    fn round(&mut self) -> Vec<u32> {
        let Some((_, events)) = self.lanes.next_round(self.now) else { return Vec::new() };
        self.send(events.len() as u32);
        (0..u32::MAX).filter(|number| events.contains(&event(*number))).take(events.len()).collect()
    }

    /// Goes to the time of the next round.
    fn skip(&mut self) {
        let due = self.lanes.due().expect("a round is due");
        assert!(due <= self.now + 80 * MS);
        self.now = self.now.max(due);
    }

    fn parked(&mut self) -> Vec<(EventRef, ParkReason)> {
        self.parked.drain(..).map(|parked| (parked.event, parked.reason)).collect()
    }
}

fn event(number: u32) -> EventRef {
    EventRef::new(u64::from(number / 2), number % 2)
}

#[test]
fn nothing_is_sent_again_before_everything_is_back_and_then_in_order() {
    let mut driver = Driver::new();
    driver.send(4);
    driver.failed(2, FailureReason::Other);
    assert!(driver.lanes.is_held(driver.lane));
    driver.lanes.hold(driver.lane, event(4));
    driver.failed(1, FailureReason::Other);
    driver.delivered();
    assert_eq!(driver.lanes.due(), None);
    driver.delivered();
    assert!(driver.round().is_empty(), "the backoff is kept");
    let mut order = Vec::new();
    while driver.lanes.is_held(driver.lane) {
        driver.skip();
        let round = driver.round();
        round.iter().for_each(|_| driver.delivered());
        order.push(round);
    }
    assert_eq!(order, [vec![1], vec![2, 4]]);
    assert_eq!((driver.lanes.held(), driver.lanes.in_client()), (0, 0));
}

#[test]
fn too_large_is_halved_and_parked_only_alone() {
    let mut driver = Driver::new();
    driver.send(8);
    (0..8).for_each(|number| driver.failed(number, FailureReason::TooLarge));
    let mut rounds = Vec::new();
    while driver.lanes.is_held(driver.lane) {
        let round = driver.round();
        for number in &round {
            match round.contains(&3) {
                true => driver.failed(*number, FailureReason::TooLarge),
                false => driver.delivered(),
            }
        }
        rounds.push(round.len());
        assert!(rounds.len() < 20, "{rounds:?}");
    }
    assert_eq!(driver.parked(), [(event(3), ParkReason::TooLarge)]);
    assert_eq!(rounds[..2], [4, 2]);
}

#[test]
fn other_failures_are_retried_for_ever() {
    let mut driver = Driver::new();
    driver.send(1);
    driver.failed(0, FailureReason::Other);
    for _ in 0..1000 {
        driver.skip();
        assert_eq!(driver.round(), [0]);
        driver.failed(0, FailureReason::Other);
    }
    assert_eq!(driver.parked(), []);
}

#[test]
fn a_forbidden_topic_is_parked_after_its_grace_and_then_at_once() {
    let mut driver = Driver::new();
    let start = driver.now;
    driver.send(2);
    driver.failed(0, FailureReason::NotAuthorised);
    driver.failed(1, FailureReason::NotAuthorised);
    while driver.lanes.is_held(driver.lane) {
        driver.skip();
        assert_eq!(driver.round(), [0]);
        driver.failed(0, FailureReason::NotAuthorised);
    }
    assert!(driver.now - start >= 1000 * MS && driver.now - start <= 1100 * MS);
    let reason = ParkReason::NotAuthorised;
    assert_eq!(driver.parked(), [(event(0), reason), (event(1), reason)]);
    driver.send(3);
    driver.failed(2, FailureReason::NotAuthorised);
    assert_eq!(driver.parked(), [(event(2), reason)]);
    driver.delivered();
    driver.failed(4, FailureReason::NotAuthorised);
    assert_eq!(driver.parked(), []);
    assert!(driver.lanes.is_held(driver.lane), "one delivery earns a new grace period");
}

#[test]
fn the_clients_own_wait_for_a_topic_counts() {
    let mut driver = Driver::new();
    let start = driver.now;
    driver.send(1);
    driver.failed(0, FailureReason::UnknownTopic);
    while driver.lanes.is_held(driver.lane) {
        driver.skip();
        driver.round();
        driver.failed(0, FailureReason::UnknownTopic);
    }
    assert!(driver.now - start >= 600 * MS && driver.now - start <= 700 * MS);
}

#[test]
fn idle_lanes_are_forgotten_and_busy_ones_kept() {
    let router = Router::new("%s", RecordKey::None);
    let mut driver = Driver::new();
    driver.send(1);
    for number in 0..LANES_MAX * 3 {
        let lane = driver.lanes.route(&router, &number.to_string()).unwrap();
        assert_eq!(driver.lanes.topic(lane), number.to_string());
    }
    assert!(driver.lanes.lanes.len() <= LANES_MAX + 1);
    assert_eq!(driver.lanes.route(&router, "t"), Some(driver.lane));
    assert_eq!(driver.lanes.route(&router, "not a topic"), None);
}

/// A lane of which the client has events 0 to 3, and 4 and 5 are held, all of it in the spill now, as 10 to 15.
fn spilled() -> (Driver, Vec<usize>) {
    let mut driver = Driver::new();
    driver.send(4);
    driver.lanes.hold_stalled(driver.now + 10 * MS, 10 * MS, driver.now);
    assert!(driver.lanes.is_held(driver.lane));
    driver.lanes.hold(driver.lane, event(4));
    driver.lanes.hold(driver.lane, event(5));
    assert_eq!(driver.lanes.held_log_events(), 6);
    let events: Vec<_> = (0..6).map(|number| (event(number), number as usize, BYTES)).collect();
    driver.lanes.moved(driver.lane, &events, 10..16, driver.now);
    assert_eq!(driver.lanes.spilled_client_bytes(), 4 * BYTES);
    (driver, (0..4).collect())
}

/// The round that is due, as numbers of the spill.
fn spilled_round(driver: &mut Driver) -> Vec<u64> {
    let Some((lane, round)) = driver.lanes.next_round(driver.now) else { return Vec::new() };
    round.iter().for_each(|event| driver.lanes.sent(lane, *event, BYTES, driver.now));
    round.iter().map(|event| event.number()).collect()
}

impl Driver {
    fn delivered_spilled(&mut self, tag: usize) {
        let (lane, event) = self.lanes.spilled_by_tag(tag).expect("it is in the spill");
        self.lanes.delivered(lane, event, BYTES, self.now, &mut self.parked);
    }

    fn failed_spilled(&mut self, tag: usize, reason: FailureReason) {
        let (lane, event) = self.lanes.spilled_by_tag(tag).expect("it is in the spill");
        self.lanes.failed(lane, event, BYTES, Failure::of(reason), self.now, &mut self.parked);
    }

    fn tag(&self, number: u64) -> usize {
        EventRef::spilled(number).spilled_tag(self.lane)
    }

    fn worked_off(&mut self) -> Option<u64> {
        self.lanes.take_worked_off().last().map(|(_, number, _)| *number + 1)
    }
}

#[test]
fn what_the_client_had_when_it_was_spilled_is_not_sent_twice() {
    let (mut driver, tags) = spilled();
    for tag in &tags {
        assert!(spilled_round(&mut driver).is_empty(), "the client has some of them");
        driver.delivered_spilled(*tag);
    }
    assert_eq!(driver.worked_off(), Some(14));
    assert_eq!(driver.lanes.spilled_client_bytes(), 0);
    driver.lanes.hold(driver.lane, event(6));
    assert_eq!(spilled_round(&mut driver), [14, 15, event(6).slot()], "what is in the spill comes first");
    for number in [15, 14] {
        driver.delivered_spilled(driver.tag(number));
    }
    assert_eq!(driver.worked_off(), Some(16));
    driver.delivered();
    assert_eq!((driver.lanes.held(), driver.lanes.in_client()), (0, 0));
}

#[test]
fn what_failed_of_it_goes_again_in_order() {
    let (mut driver, tags) = spilled();
    driver.delivered_spilled(tags[0]);
    driver.failed_spilled(tags[2], FailureReason::Other);
    driver.delivered_spilled(tags[3]);
    driver.failed_spilled(tags[1], FailureReason::Other);
    assert_eq!(driver.worked_off(), Some(11));
    let mut order = Vec::new();
    while driver.lanes.is_held(driver.lane) {
        driver.skip();
        let round = spilled_round(&mut driver);
        round.iter().for_each(|number| driver.delivered_spilled(driver.tag(*number)));
        order.extend(round);
    }
    assert_eq!(order, [11, 12, 14, 15]);
    assert_eq!(driver.worked_off(), Some(16));
}

#[test]
fn a_refused_topic_is_parked_out_of_the_spill_and_no_event_twice() {
    let mut driver = Driver::new();
    driver.lanes.restore("t", 100..200, driver.now);
    let mut parked = Vec::new();
    let mut turns = 0;
    while driver.lanes.is_held(driver.lane) {
        turns += 1;
        assert!(turns < 1000, "{parked:?}");
        driver.now = driver.lanes.due().unwrap_or(driver.now).max(driver.now);
        for number in spilled_round(&mut driver) {
            driver.failed_spilled(driver.tag(number), FailureReason::NotAuthorised);
        }
        for ToPark { event, lane, .. } in std::mem::take(&mut driver.parked) {
            parked.push(event.number());
            driver.lanes.done(lane.unwrap(), event, Fate::Parked(ParkReason::NotAuthorised));
            driver.lanes.settle(lane.unwrap(), driver.now, &mut Vec::new());
        }
    }
    parked.sort_unstable();
    assert_eq!(parked, (100..200).collect::<Vec<_>>());
}

#[test]
fn with_transactions_a_lane_that_has_caught_up_is_released_with_what_came_meanwhile() {
    let mut driver = Driver::with(true);
    driver.lanes.restore("t", 100..104, driver.now);
    [event(0), event(1)].iter().for_each(|event| driver.lanes.hold(driver.lane, *event));
    let mut delivered = 0;
    while delivered < 4 {
        assert_eq!(driver.lanes.release_caught_up(driver.lane, driver.now), [], "the spill comes first");
        driver.skip();
        for number in spilled_round(&mut driver) {
            driver.delivered_spilled(driver.tag(number));
            delivered += 1;
        }
    }
    assert!(driver.lanes.is_held(driver.lane) && spilled_round(&mut driver).is_empty());
    assert_eq!(driver.lanes.release_caught_up(driver.lane, driver.now), [event(0), event(1)]);
    assert!(!driver.lanes.is_held(driver.lane));
    driver.lanes.expect("t", Failure::of(FailureReason::Other), driver.now);
    driver.lanes.hold(driver.lane, event(0));
    assert_eq!(driver.lanes.release_caught_up(driver.lane, driver.now), [], "it has just failed");
}

#[test]
fn of_many_held_lanes_each_has_its_turn_when_it_is_due() {
    let (mut driver, router) = (Driver::new(), Router::new("%s", RecordKey::None));
    let failure = Failure::of(FailureReason::Other);
    for number in 0..500 {
        let lane = driver.lanes.route(&router, &number.to_string()).unwrap();
        driver.lanes.sent(lane, event(0), BYTES, driver.now);
        driver.lanes.failed(lane, event(0), BYTES, failure, driver.now, &mut driver.parked);
    }
    for _ in 0..200 {
        driver.now += MS;
        while let Some((lane, round)) = driver.lanes.next_round(driver.now) {
            assert_eq!(round, [event(0)]);
            driver.lanes.sent(lane, event(0), BYTES, driver.now);
            driver.lanes.failed(lane, event(0), BYTES, failure, driver.now, &mut driver.parked);
        }
        let holds = driver.lanes.lanes.iter_mut().filter_map(|lane| lane.hold.as_mut());
        let due: Vec<Instant> = holds.map(|hold| hold.retry_at().expect("it is to be tried again")).collect();
        assert_eq!((due.len(), due.iter().min().copied()), (500, driver.lanes.due()));
        assert!(driver.lanes.due() > Some(driver.now));
    }
}

#[test]
fn a_lane_that_moves_is_not_held() {
    let mut driver = Driver::new();
    driver.send(2);
    driver.now += 10 * MS;
    driver.delivered();
    driver.lanes.hold_stalled(driver.now + 9 * MS, 10 * MS, driver.now);
    assert!(!driver.lanes.is_held(driver.lane));
    driver.lanes.hold_stalled(driver.now + 20 * MS, 10 * MS, driver.now + 15 * MS);
    assert!(!driver.lanes.is_held(driver.lane), "the broker was away");
    driver.lanes.hold_stalled(driver.now + 10 * MS, 10 * MS, driver.now);
    assert!(driver.lanes.is_held(driver.lane));
}

#[test]
fn what_was_delivered_earlier_is_skipped_and_not_sent_again() {
    let mut driver = Driver::new();
    driver.lanes.restore("t", 100..110, driver.now);
    assert_eq!(spilled_round(&mut driver), [100, 101]);
    for number in [100, 101] {
        let event = EventRef::spilled(number);
        driver.lanes.returned(driver.lane, event, BYTES, driver.now);
    }
    // A number that was never given out, as after the spill was removed, is not believed.
    driver.lanes.skip_to("t", 5000, driver.now);
    assert_eq!(driver.worked_off(), None);
    driver.lanes.skip_to("t", 105, driver.now);
    assert_eq!(driver.worked_off(), Some(105));
    driver.now = driver.lanes.due().unwrap_or(driver.now).max(driver.now);
    let round = spilled_round(&mut driver);
    assert_eq!(round[0], 105);
    round.iter().for_each(|number| driver.delivered_spilled(driver.tag(*number)));
    driver.lanes.skip_to("t", 110, driver.now);
    assert_eq!(driver.worked_off(), Some(110));
    assert!(!driver.lanes.is_held(driver.lane));
}

#[test]
fn a_lane_is_not_forgotten_before_what_it_has_worked_off_is_noted() {
    let mut driver = Driver::new();
    let now = driver.now;
    driver.lanes.restore("a", 50..51, now);
    let (a, events) = driver.lanes.next_round(now).unwrap();
    driver.lanes.sent(a, events[0], BYTES, now);
    driver.lanes.delivered(a, events[0], BYTES, now, &mut driver.parked);
    assert!(!driver.lanes.is_held(a));
    for at in 0..LANES_MAX as u64 {
        driver.lanes.restore(&format!("b{at}"), 100 + at..101 + at, now);
    }
    let worked_off = driver.lanes.take_worked_off();
    assert_eq!(worked_off.len(), 1);
    assert_eq!(driver.lanes.topic(worked_off[0].0), "a");
}
