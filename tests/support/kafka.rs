//! A real Apache Kafka for tests: one broker and controller in one process, on loopback, in a directory of its own; or a
//! [`Cluster`] of three such.
//!
//! Needs Java 17 and Maven. The jars are resolved once, into `target/kafka-jars`. A broker is a child of the test and ends
//! with it: [`Kafka`] kills it when it is dropped, also by a panic, and then shows the end of its log.

#![allow(dead_code, reason = "each test uses its own part")]

#[path = "kafka_acl.rs"]
mod acl;

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use acl::Acl;
use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};
use tempfile::TempDir;

const KAFKA_VERSION: &str = "4.3.1";
const CLUSTER_ID: &str = "MkU3OEVBNTcwNTJENDM2Qk";
const OTHER_CLUSTER_ID: &str = "NkU3OEVBNTcwNTJENDM2Qk";

/// Longest that a broker may take to start or to stop.
const BROKER_PATIENCE: Duration = Duration::from_secs(90);
/// Longest that reading a topic may take.
const READ_PATIENCE: Duration = Duration::from_secs(120);

/// Partitions of a topic that is created by the first event for it.
pub const PARTITIONS: i32 = 4;

/// Ports are taken below the range from which connections get theirs.
const PORTS: std::ops::Range<u16> = 20_000..32_000;

/// How a broker is to be started.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Lines of `server.properties` to add, or to replace those with the same key.
    pub properties: Vec<(String, String)>,
    /// More heap, and the optimising compiler: for throughput.
    pub fast: bool,
    /// Access control: everything is allowed until [`Kafka::deny`] says otherwise.
    pub acls: bool,
    /// Where clients are sent instead of to the broker's own port: a proxy.
    pub advertised_port: Option<u16>,
    /// By which name clients are sent to it, instead of by its address.
    pub advertised_host: Option<&'static str>,
    /// More listeners, by security protocol, which is also the listener's name.
    pub listeners: Vec<&'static str>,
    /// SCRAM-SHA-256 users and their passwords.
    pub scram_users: Vec<(String, String)>,
}

/// A running, or deliberately not running, broker.
pub struct Kafka {
    directory: TempDir,
    node: Node,
    cluster_id: &'static str,
    options: Options,
    child: Option<Child>,
}

/// A broker's place in its cluster.
#[derive(Debug, Clone)]
struct Node {
    id: usize,
    port: u16,
    /// For the test's own clients, where others are sent to a proxy.
    direct_port: u16,
    /// Of [`Options::listeners`].
    listener_ports: Vec<u16>,
    controller_port: u16,
    /// `controller.quorum.voters`
    voters: String,
    /// Where the test's own clients connect.
    bootstrap: String,
    replication: i32,
}

/// Three brokers and controllers: each partition has three replicas, of which two must be in sync.
pub struct Cluster {
    pub nodes: Vec<Kafka>,
}

/// What may be done with a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denied {
    /// Only writing is not allowed.
    Write,
    /// Nothing is allowed, not even to know of it.
    Everything,
}

/// A record of a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsumedRecord {
    pub partition: i32,
    pub offset: i64,
    pub key: Option<Vec<u8>>,
    pub value: Vec<u8>,
}

impl Kafka {
    /// Starts a broker with an empty data directory, and waits until it takes requests.
    pub fn start() -> Kafka {
        Kafka::start_with(Options::default())
    }

    /// The same with options.
    pub fn start_with(options: Options) -> Kafka {
        let mut kafka = Kafka::prepare(&options, Node::alone(&options));
        kafka.restart();
        kafka
    }

    /// A broker with an empty data directory that does not run yet.
    fn prepare(options: &Options, node: Node) -> Kafka {
        let directory = tempfile::Builder::new().prefix("ringtail-kafka-").tempdir().expect("make a directory");
        let kafka = Kafka { directory, node, cluster_id: CLUSTER_ID, options: options.clone(), child: None };
        kafka.write_properties();
        kafka.format();
        kafka
    }

    /// `host:port` for clients.
    pub fn bootstrap(&self) -> String {
        let host = self.options.advertised_host.unwrap_or("127.0.0.1");
        format!("{host}:{}", self.options.advertised_port.unwrap_or(self.node.port))
    }

    /// `host:port` for clients of one of [`Options::listeners`].
    pub fn bootstrap_of(&self, listener: &str) -> String {
        let at = self.options.listeners.iter().position(|name| *name == listener).expect("there is such a listener");
        format!("127.0.0.1:{}", self.node.listener_ports[at])
    }

    /// The port on which the broker itself listens for clients.
    pub fn port(&self) -> u16 {
        self.node.port
    }

    /// Removes all data of a stopped broker: it comes back as a cluster that nobody knows.
    pub fn wipe(&mut self) {
        assert!(self.child.is_none(), "the broker runs");
        fs::remove_dir_all(self.directory.path().join("data")).expect("remove the broker's data");
        self.cluster_id = OTHER_CLUSTER_ID;
        self.format();
    }

    /// Process id of the broker, which must be running.
    pub fn pid(&self) -> i32 {
        let child = self.child.as_ref().expect("the broker was stopped");
        i32::try_from(child.id()).expect("a process id is an i32")
    }

    /// Ends the broker as an operator does, and waits for its end.
    pub fn stop(&mut self) {
        self.signal(libc::SIGTERM);
        let child = self.child.as_mut().expect("the broker was stopped");
        let deadline = Instant::now() + BROKER_PATIENCE;
        while child.try_wait().expect("wait for the broker").is_none() {
            assert!(Instant::now() < deadline, "the broker does not stop\n{}", self.log_end());
            std::thread::sleep(Duration::from_millis(20));
        }
        self.child = None;
    }

    /// Ends the broker with SIGKILL.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("the broker was stopped");
        child.kill().expect("kill the broker");
        child.wait().expect("wait for the broker");
    }

    /// Stops the broker's clock: connections stay, nothing answers.
    pub fn freeze(&self) {
        self.signal(libc::SIGSTOP);
    }

    /// Lets a frozen broker run again.
    pub fn thaw(&self) {
        self.signal(libc::SIGCONT);
    }

    fn signal(&self, signal: i32) {
        // SAFETY: kill has no preconditions; the child has not been waited for, so the id is still its own.
        let result = unsafe { libc::kill(self.pid(), signal) };
        assert_eq!(result, 0, "signal the broker: {}", std::io::Error::last_os_error());
    }

    /// Starts a stopped or killed broker again, on the same data and ports, and waits until it takes requests.
    pub fn restart(&mut self) {
        self.spawn();
        self.wait_until_started();
    }

    fn spawn(&mut self) {
        assert!(self.child.is_none(), "the broker runs");
        let log = File::create(self.log_path()).expect("make the broker's log");
        let mut command = self.java(if self.options.fast { &["-Xmx768m"] } else { &["-Xmx192m"] });
        if !self.options.fast {
            command.arg("-XX:TieredStopAtLevel=1");
        }
        command.arg("-cp").arg(class_path()).arg("kafka.Kafka").arg(self.properties_path());
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("share the log")).stderr(log);
        self.child = Some(command.spawn().expect("start java: is Java 17 installed?"));
    }

    fn wait_until_started(&mut self) {
        let deadline = Instant::now() + BROKER_PATIENCE;
        loop {
            let log = fs::read_to_string(self.log_path()).unwrap_or_default();
            if log.contains("Kafka Server started") {
                return;
            }
            let ended = self.child.as_mut().and_then(|child| child.try_wait().expect("wait for the broker"));
            assert!(ended.is_none(), "the broker ended, {ended:?}\n{}", self.log_end());
            assert!(Instant::now() < deadline, "the broker does not start\n{}", self.log_end());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Creates a topic, and waits until its partitions have leaders.
    pub fn create_topic(&self, name: &str, partitions: i32, config: &[(&str, &str)]) {
        let admin = self.admin();
        let replication = TopicReplication::Fixed(self.node.replication);
        let topic = config
            .iter()
            .fold(NewTopic::new(name, partitions, replication), |topic, (key, value)| topic.set(key, value));
        let results = block_on(admin.create_topics([&topic], &admin_options())).expect("create the topic");
        for result in results {
            result.unwrap_or_else(|(topic, code)| panic!("create {topic}: {code}"));
        }
        let deadline = Instant::now() + BROKER_PATIENCE;
        let consumer = self.consumer(false);
        while self.partitions(&consumer, name).len() < partitions as usize {
            assert!(Instant::now() < deadline, "the topic {name} does not get its leaders");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Removes a topic, and waits until it is gone.
    pub fn delete_topic(&self, name: &str) {
        let results = block_on(self.admin().delete_topics(&[name], &admin_options())).expect("delete the topic");
        for result in results {
            result.unwrap_or_else(|(topic, code)| panic!("delete {topic}: {code}"));
        }
    }

    /// Gives a topic this configuration, and the default one otherwise.
    pub fn configure_topic(&self, name: &str, config: &[(&str, &str)]) {
        let topic = AlterConfig::new(ResourceSpecifier::Topic(name));
        let topic = config.iter().fold(topic, |topic, (key, value)| topic.set(key, value));
        let results = block_on(self.admin().alter_configs([&topic], &admin_options())).expect("configure the topic");
        for result in results {
            result.unwrap_or_else(|(topic, code)| panic!("configure {topic:?}: {code}"));
        }
    }

    /// Takes away what everybody may do with a topic. Needs [`Options::acls`].
    pub fn deny(&self, topic: &str, denied: Denied) {
        match denied {
            Denied::Write => {
                self.create_acl(topic, "User:*", Acl::AllowAll);
                self.create_acl(topic, "User:*", Acl::DenyWrite);
            }
            // Once a topic has a rule, whoever is not named may nothing.
            Denied::Everything => self.create_acl(topic, "User:nobody", Acl::AllowAll),
        }
    }

    /// Everybody may do everything with a topic again.
    pub fn allow(&self, topic: &str) {
        acl::delete(&self.admin(), topic);
    }

    /// Gives a SCRAM-SHA-256 user another password. Needs the feature `kafka-tls`.
    pub fn set_scram_password(&self, user: &str, password: &str) {
        acl::set_scram_password(&self.admin(), user, password);
    }

    /// Changes lines of `server.properties`, for the next start.
    pub fn set_property(&mut self, key: &str, value: &str) {
        self.options.properties.retain(|(known, _)| known != key);
        self.options.properties.push((key.to_owned(), value.to_owned()));
        self.write_properties();
    }

    fn create_acl(&self, topic: &str, principal: &str, rule: Acl) {
        acl::create(&self.admin(), topic, principal, rule);
    }

    /// The brokers that lead partitions of a topic, by partition.
    pub fn leaders(&self, topic: &str) -> Vec<i32> {
        let consumer = self.consumer(false);
        let metadata = consumer.fetch_metadata(Some(topic), BROKER_PATIENCE).expect("fetch metadata");
        let found = metadata.topics().iter().filter(|found| found.name() == topic);
        found.flat_map(|topic| topic.partitions()).map(|partition| partition.leader()).collect()
    }

    /// In-sync replicas of the partition of a topic that has fewest.
    pub fn in_sync_least(&self, topic: &str) -> usize {
        let consumer = self.consumer(false);
        let metadata = consumer.fetch_metadata(Some(topic), BROKER_PATIENCE).expect("fetch metadata");
        let found = metadata.topics().iter().filter(|found| found.name() == topic);
        found.flat_map(|topic| topic.partitions()).map(|partition| partition.isr().len()).min().unwrap_or(0)
    }

    /// Every record of a topic up to the high watermarks, by partition and offset. A topic that is not there is empty.
    pub fn read_topic(&self, topic: &str) -> Vec<ConsumedRecord> {
        self.read(topic, false)
    }

    /// The same for a reader that sees committed transactions only.
    pub fn read_topic_committed(&self, topic: &str) -> Vec<ConsumedRecord> {
        self.read(topic, true)
    }

    fn read(&self, topic: &str, committed: bool) -> Vec<ConsumedRecord> {
        let mut records = Vec::new();
        self.read_each(topic, committed, READ_PATIENCE, |record| records.push(record));
        records.sort_by_key(|record| (record.partition, record.offset));
        records
    }

    /// Gives every record of a topic up to the high watermarks to `take`, each partition in order.
    pub fn read_each(&self, topic: &str, committed: bool, patience: Duration, mut take: impl FnMut(ConsumedRecord)) {
        let consumer = self.consumer(committed);
        let mut open = self.partitions(&consumer, topic);
        let mut assignment = TopicPartitionList::new();
        for partition in &open {
            assignment.add_partition_offset(topic, *partition, Offset::Beginning).expect("a valid offset");
        }
        consumer.assign(&assignment).expect("assign partitions");
        let deadline = Instant::now() + patience;
        while !open.is_empty() {
            assert!(Instant::now() < deadline, "reading {topic} takes longer than {patience:?}");
            match consumer.poll(Duration::from_millis(200)) {
                None => {}
                Some(Err(KafkaError::PartitionEOF(ended))) => open.retain(|partition| *partition != ended),
                Some(Err(error)) => panic!("read {topic}: {error}"),
                Some(Ok(message)) => take(ConsumedRecord {
                    partition: message.partition(),
                    offset: message.offset(),
                    key: message.key().map(<[u8]>::to_vec),
                    value: message.payload().unwrap_or_default().to_vec(),
                }),
            }
        }
    }

    /// Partitions of a topic that have a leader.
    fn partitions(&self, consumer: &BaseConsumer, topic: &str) -> Vec<i32> {
        let metadata = consumer.fetch_metadata(Some(topic), BROKER_PATIENCE).expect("fetch metadata");
        let topics = metadata.topics().iter().filter(|found| found.name() == topic && found.error().is_none());
        let partitions = topics.flat_map(|topic| topic.partitions());
        partitions.filter(|partition| partition.leader() >= 0).map(|partition| partition.id()).collect()
    }

    fn consumer(&self, committed: bool) -> BaseConsumer {
        self.client()
            .set("group.id", "ringtail-test")
            .set("enable.auto.commit", "false")
            .set("enable.partition.eof", "true")
            .set("isolation.level", if committed { "read_committed" } else { "read_uncommitted" })
            .create()
            .expect("make a consumer")
    }

    fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.node.bootstrap);
        config
    }

    fn admin(&self) -> AdminClient<DefaultClientContext> {
        self.client().create().expect("make an admin client")
    }

    fn format(&self) {
        let output = self
            .java(&["-Xmx64m", "-XX:TieredStopAtLevel=1"])
            .arg("-cp")
            .arg(class_path())
            .args(["kafka.tools.StorageTool", "format", "-t", self.cluster_id, "-c"])
            .arg(self.properties_path())
            .args(self.options.scram_users.iter().flat_map(|(name, password)| {
                ["--add-scram".to_owned(), format!("SCRAM-SHA-256=[name={name},password={password}]")]
            }))
            .output()
            .expect("start java: is Java 17 installed?");
        assert!(output.status.success(), "format: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn java(&self, options: &[&str]) -> Command {
        let mut command = Command::new("java");
        command.arg("-XX:+UseSerialGC").args(options).current_dir(self.directory.path());
        command
    }

    fn write_properties(&self) {
        let Node { id, port, direct_port, controller_port, voters, listener_ports, replication, .. } = &self.node;
        let data = self.directory.path().join("data");
        let mut listeners = vec![("PLAINTEXT", "PLAINTEXT", *port), ("DIRECT", "PLAINTEXT", *direct_port)];
        let more = self.options.listeners.iter().zip(listener_ports);
        listeners.extend(more.map(|(protocol, port)| (*protocol, *protocol, *port)));
        let list = |of: &dyn Fn(&(&str, &str, u16)) -> String| listeners.iter().map(of).collect::<Vec<_>>().join(",");
        let advertised = |(name, _, port): &(&str, &str, u16)| {
            let is_plain = *name == "PLAINTEXT";
            let port = self.options.advertised_port.filter(|_| is_plain).unwrap_or(*port);
            let host = self.options.advertised_host.filter(|_| is_plain).unwrap_or("127.0.0.1");
            format!("{name}://{host}:{port}")
        };
        let listened = list(&|(name, _, port)| format!("{name}://127.0.0.1:{port}"));
        let protocols = list(&|(name, protocol, _)| format!("{name}:{protocol}"));
        let in_sync_min = (replication + 1) / 2;
        let mut lines = vec![
            ("process.roles", "broker,controller".to_owned()),
            ("node.id", id.to_string()),
            ("controller.quorum.voters", voters.clone()),
            ("listeners", format!("{listened},CONTROLLER://127.0.0.1:{controller_port}")),
            ("advertised.listeners", list(&advertised)),
            ("controller.listener.names", "CONTROLLER".into()),
            ("inter.broker.listener.name", "DIRECT".into()),
            ("listener.security.protocol.map", format!("{protocols},CONTROLLER:PLAINTEXT")),
            ("log.dirs", data.display().to_string()),
            ("num.partitions", PARTITIONS.to_string()),
            ("auto.create.topics.enable", "true".into()),
            ("default.replication.factor", replication.to_string()),
            ("min.insync.replicas", in_sync_min.to_string()),
            ("offsets.topic.replication.factor", replication.to_string()),
            ("offsets.topic.num.partitions", "1".into()),
            ("transaction.state.log.replication.factor", replication.to_string()),
            ("transaction.state.log.min.isr", in_sync_min.to_string()),
            ("transaction.state.log.num.partitions", "1".into()),
            ("group.initial.rebalance.delay.ms", "0".into()),
            ("log.cleaner.dedupe.buffer.size", "4194304".into()),
            ("broker.session.timeout.ms", "1500".into()),
            ("broker.heartbeat.interval.ms", "300".into()),
        ];
        if self.options.acls {
            let authorizer = "org.apache.kafka.metadata.authorizer.StandardAuthorizer";
            lines.push(("authorizer.class.name", authorizer.into()));
            lines.push(("allow.everyone.if.no.acl.found", "true".into()));
        }
        lines.retain(|(key, _)| self.options.properties.iter().all(|(own, _)| own != key));
        let own = self.options.properties.iter().map(|(key, value)| (key.as_str(), value.clone()));
        let text: String = lines.into_iter().chain(own).map(|(key, value)| format!("{key}={value}\n")).collect();
        fs::write(self.properties_path(), text).expect("write server.properties");
    }

    fn properties_path(&self) -> PathBuf {
        self.directory.path().join("server.properties")
    }

    fn log_path(&self) -> PathBuf {
        self.directory.path().join("broker.log")
    }

    fn log_end(&self) -> String {
        let log = fs::read_to_string(self.log_path()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

impl Node {
    fn new(options: &Options, id: usize) -> Node {
        let (port, direct_port, controller_port) = (free_port(), free_port(), free_port());
        Node {
            id,
            port,
            direct_port,
            listener_ports: options.listeners.iter().map(|_| free_port()).collect(),
            controller_port,
            voters: format!("{id}@127.0.0.1:{controller_port}"),
            bootstrap: format!("127.0.0.1:{direct_port}"),
            replication: 1,
        }
    }

    fn alone(options: &Options) -> Node {
        Node::new(options, 1)
    }
}

impl Cluster {
    /// Starts three brokers with empty data directories, and waits until they take requests.
    pub fn start(options: &Options) -> Cluster {
        let mut nodes: Vec<Node> = (1..=3).map(|id| Node::new(options, id)).collect();
        let join = |of: &dyn Fn(&Node) -> String| nodes.iter().map(of).collect::<Vec<_>>().join(",");
        let (voters, bootstrap) = (join(&|node| node.voters.clone()), join(&|node| node.bootstrap.clone()));
        for node in &mut nodes {
            (node.voters, node.bootstrap, node.replication) = (voters.clone(), bootstrap.clone(), 3);
        }
        let mut nodes: Vec<Kafka> = nodes.into_iter().map(|node| Kafka::prepare(options, node)).collect();
        nodes.iter_mut().for_each(Kafka::spawn);
        nodes.iter_mut().for_each(Kafka::wait_until_started);
        Cluster { nodes }
    }

    /// `host:port` of every broker, for clients.
    pub fn bootstraps(&self) -> Vec<String> {
        self.nodes.iter().map(Kafka::bootstrap).collect()
    }

    /// The broker with that id.
    pub fn node(&mut self, id: i32) -> &mut Kafka {
        self.nodes.iter_mut().find(|node| node.node.id as i32 == id).expect("there is a broker with that id")
    }
}

/// Longest that the broker may take for one order.
fn admin_options() -> AdminOptions {
    AdminOptions::new().operation_timeout(Some(BROKER_PATIENCE))
}

impl Drop for Kafka {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the broker's log ends with:\n{}", self.log_end());
        }
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A port that nobody uses and that no other call in this process has returned.
pub fn free_port() -> u16 {
    static NEXT: OnceLock<AtomicU16> = OnceLock::new();
    let size = PORTS.end - PORTS.start;
    let next = NEXT.get_or_init(|| AtomicU16::new(rand::random_range(0..size)));
    let ports = std::iter::repeat_with(|| PORTS.start + next.fetch_add(1, Ordering::Relaxed) % size);
    let mut free = ports.take(size.into()).filter(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok());
    free.next().expect("a port is free")
}

/// Runs a future to its end, inside a runtime or outside.
fn block_on<T: Send>(future: impl Future<Output = T> + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("make a runtime").block_on(future)
        });
        thread.join().expect("the future does not panic")
    })
}

/// The class path of Kafka, resolved through Maven when it is first needed.
fn class_path() -> &'static str {
    static CLASS_PATH: OnceLock<String> = OnceLock::new();
    CLASS_PATH.get_or_init(|| {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("target/tmp is in target");
        let jars = target.join("kafka-jars").join(KAFKA_VERSION);
        if !jars.exists() {
            resolve(&jars);
        }
        let entries = fs::read_dir(&jars).expect("read target/kafka-jars");
        let mut paths: Vec<String> = entries
            .map(|entry| entry.expect("read target/kafka-jars").path().display().to_string())
            .filter(|path| path.ends_with(".jar"))
            .collect();
        paths.sort();
        paths.join(":")
    })
}

/// Copies Kafka's jars to `jars`, which appears only when it is complete.
fn resolve(jars: &Path) {
    let parent = jars.parent().expect("the directory has a parent");
    fs::create_dir_all(parent).expect("make target/kafka-jars");
    let work = tempfile::Builder::new().prefix("resolving-").tempdir_in(parent).expect("make a directory");
    let pom = work.path().join("pom.xml");
    fs::write(&pom, pom_xml()).expect("write pom.xml");
    let output = Command::new("mvn")
        .args(["-q", "-B", "-f"])
        .arg(&pom)
        .args(["org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy-dependencies", "-DincludeScope=runtime"])
        .arg(format!("-DoutputDirectory={}", work.path().join("jars").display()))
        .output()
        .expect("start mvn: is Maven installed?");
    let text = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "maven: {}", String::from_utf8_lossy(&text));
    // Another process may have been faster: its jars are as good.
    if fs::rename(work.path().join("jars"), jars).is_err() {
        assert!(jars.exists(), "cannot move kafka's jars to {}", jars.display());
    }
}

/// Kafka, and a binding without which its logs vanish.
fn pom_xml() -> String {
    let dependency = |group: &str, artifact: &str, version: &str| {
        format!(
            "<dependency><groupId>{group}</groupId><artifactId>{artifact}</artifactId>\
             <version>{version}</version></dependency>"
        )
    };
    format!(
        "<project xmlns=\"http://maven.apache.org/POM/4.0.0\"><modelVersion>4.0.0</modelVersion>\
         <groupId>ringtail</groupId><artifactId>kafka</artifactId><version>1</version><dependencies>{}{}</dependencies>\
         </project>",
        dependency("org.apache.kafka", "kafka_2.13", KAFKA_VERSION),
        dependency("org.slf4j", "slf4j-simple", "1.7.36"),
    )
}
