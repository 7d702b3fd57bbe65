//! Kafka over TLS with an own CA, client certificates, and SCRAM: what is wrong is told, and what is rotated is picked up, while
//! collecting goes on and nothing is lost.

#[path = "support/http.rs"]
mod http;
#[path = "support/kafka.rs"]
mod kafka;
#[path = "support/row.rs"]
mod row;
#[path = "support/service.rs"]
mod service;
#[path = "support/traffic.rs"]
mod traffic;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use kafka::{Kafka, Options};
use row::{Fault, finish};
use service::Service;
use tempfile::TempDir;
use traffic::{Load, Traffic};

const PATIENCE: Duration = Duration::from_secs(120);

/// Certificates and keys, in a directory.
struct Certificates {
    directory: TempDir,
}

impl Certificates {
    fn new() -> Certificates {
        let directory = tempfile::Builder::new().prefix("ringtail-tls-").tempdir().expect("make a directory");
        let certificates = Certificates { directory };
        fs::write(certificates.path("san"), "subjectAltName=IP:127.0.0.1\n").expect("write");
        certificates
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Makes `<name>.pem` and `<name>.key`, which sign others.
    fn make_ca(&self, name: &str) {
        let subject = format!("/CN={name}");
        let (key, pem) = (format!("{name}.key"), format!("{name}.pem"));
        self.openssl(&[
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", &subject, "-keyout", &key, "-out",
            &pem,
        ]);
    }

    /// Makes `<name>.pem` and `<name>.key`, signed by `ca`, and `<name>.both`.
    fn make(&self, name: &str, ca: &str) {
        self.make_for(name, ca, "30");
    }

    /// The same, valid for so many days from now, which may be less than none.
    fn make_for(&self, name: &str, ca: &str, days: &str) {
        let subject = format!("/CN={name}");
        let (key, request, pem) = (format!("{name}.key"), format!("{name}.csr"), format!("{name}.pem"));
        let (ca_key, ca_pem) = (format!("{ca}.key"), format!("{ca}.pem"));
        self.openssl(&["req", "-newkey", "rsa:2048", "-nodes", "-subj", &subject, "-keyout", &key, "-out", &request]);
        self.openssl(&[
            "x509",
            "-req",
            "-in",
            &request,
            "-CA",
            &ca_pem,
            "-CAkey",
            &ca_key,
            "-CAcreateserial",
            "-days",
            days,
            "-extfile",
            "san",
            "-out",
            &pem,
        ]);
        self.join(&format!("{name}.both"), &[&key, &pem]);
    }

    fn join(&self, name: &str, parts: &[&str]) {
        let text: String = parts.iter().map(|part| fs::read_to_string(self.path(part)).expect("read")).collect();
        fs::write(self.path(name), text).expect("write");
    }

    fn openssl(&self, arguments: &[&str]) {
        let output = Command::new("openssl").args(arguments).current_dir(self.directory.path()).output();
        let output = output.expect("start openssl: is it installed?");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// A broker with the certificate `broker`, that trusts the clients of the CAs in `trusted`.
fn kafka(certificates: &Certificates, trusted: &str, scram_users: &[(&str, &str)]) -> Kafka {
    let path = |name: &str| certificates.path(name).display().to_string();
    let properties = [
        ("ssl.keystore.type", "PEM".to_owned()),
        ("ssl.keystore.location", path("broker.both")),
        ("ssl.truststore.type", "PEM".into()),
        ("ssl.truststore.location", path(trusted)),
        ("listener.name.ssl.ssl.client.auth", "required".into()),
        ("listener.name.sasl_ssl.sasl.enabled.mechanisms", "SCRAM-SHA-256".into()),
        (
            "listener.name.sasl_ssl.scram-sha-256.sasl.jaas.config",
            "org.apache.kafka.common.security.scram.ScramLoginModule required;".into(),
        ),
    ];
    Kafka::start_with(Options {
        properties: properties.map(|(key, value)| (key.to_owned(), value)).into(),
        listeners: vec!["SSL", "SASL_SSL"],
        scram_users: scram_users.iter().map(|(user, password)| ((*user).into(), (*password).into())).collect(),
        ..Options::default()
    })
}

fn setting(name: &str, path: &Path) -> String {
    format!("\"{name}\" = \"{}\"\n", path.display())
}

fn load() -> Load {
    Load { clients_per_protocol: 1, ..Load::default() }
}

#[test]
fn a_wrong_password_is_told_and_a_rotated_one_picked_up() {
    for delivery in ["at_least_once", "exactly_once"] {
        let certificates = Certificates::new();
        certificates.make_ca("ca");
        certificates.make("broker", "ca");
        let mut kafka = kafka(&certificates, "ca.pem", &[("alice", "right")]);
        let password = certificates.path("password");
        fs::write(&password, "wrong\n").unwrap();
        let forward = format!(
            "delivery = \"{delivery}\"\nkafka_password_file = \"{}\"\n[forward.kafka]\n\"security.protocol\" = \"sasl_ssl\"\n\
             \"sasl.mechanism\" = \"SCRAM-SHA-256\"\n\"sasl.username\" = \"alice\"\n{}",
            password.display(),
            setting("ssl.ca.location", &certificates.path("ca.pem"))
        );
        let mut service = Service::start(&kafka.bootstrap_of("SASL_SSL"), &forward);
        let traffic = Traffic::start(service.ports(), load());
        service.wait_for("the error to be told", PATIENCE, |service| {
            service.status()["forward"]["last_error"].to_string().contains("uthentication")
        });
        sleep(Duration::from_secs(6));
        assert_eq!(service.delivered(), 0.0);
        assert_eq!((service.get("/readyz").0, service.get("/livez").0), (200, 200));
        let lines = service.life_log().lines().filter(|line| line.contains("uthentication")).count();
        assert!((1..=4).contains(&lines), "it is told, and not at every attempt:\n{}", service.life_log());
        assert!(traffic.acked() > 500, "collecting goes on");

        fs::write(&password, "right\n").unwrap();
        service.wait_for_deliveries(1000.0);
        // Rotated while it works: the file first, the broker at the next moment, and then every connection breaks.
        kafka.set_scram_password("alice", "newer");
        fs::write(certificates.path("new"), "newer").unwrap();
        fs::rename(certificates.path("new"), &password).unwrap();
        service.wait_for("the new password to be seen", PATIENCE, |service| {
            service.logged("credentials have changed") == 2
        });
        service.wait_for_deliveries(1000.0);
        kafka.kill();
        kafka.restart();
        service.wait_for_deliveries(1000.0);
        assert!(
            !service.log().contains("newer") && !service.status().to_string().contains("newer"),
            "it stays a secret"
        );
        let name = if delivery == "exactly_once" { "password rotated, exactly once" } else { "password rotated" };
        let what = "SCRAM over TLS: wrong password, then the right one, then another; broker restarted";
        let fault = Fault { name, what, exactly_once: delivery == "exactly_once" };
        let findings = finish(fault, &mut service, traffic, &kafka, Vec::new());
        assert_eq!((findings.parked, findings.out_of_order), (0, 0));
    }
}

#[test]
fn a_rotated_certificate_is_picked_up() {
    let certificates = Certificates::new();
    certificates.make_ca("ca");
    certificates.make_ca("newer-ca");
    certificates.make("broker", "ca");
    certificates.make("client", "ca");
    certificates.make("newer-client", "newer-ca");
    certificates.join("trusted", &["ca.pem", "newer-ca.pem"]);
    let mut kafka = kafka(&certificates, "trusted", &[]);
    let forward = format!(
        "[forward.kafka]\n\"security.protocol\" = \"ssl\"\n{}{}{}",
        setting("ssl.ca.location", &certificates.path("ca.pem")),
        setting("ssl.certificate.location", &certificates.path("client.pem")),
        setting("ssl.key.location", &certificates.path("client.key"))
    );
    let mut service = Service::start(&kafka.bootstrap_of("SSL"), &forward);
    let traffic = Traffic::start(service.ports(), load());
    service.wait_for_deliveries(1000.0);

    // One file after the other: together they do not do in between.
    fs::copy(certificates.path("newer-client.pem"), certificates.path("client.pem")).unwrap();
    service.wait_for("the misfit to be told", PATIENCE, |service| service.logged("cannot be used yet") == 1);
    service.wait_for_deliveries(1000.0);
    fs::copy(certificates.path("newer-client.key"), certificates.path("client.key")).unwrap();
    service.wait_for("the new certificate", PATIENCE, |service| service.logged("credentials have changed") == 1);
    service.wait_for_deliveries(1000.0);
    // Whoever still has the old one stays outside.
    kafka.kill();
    kafka.set_property("ssl.truststore.location", &certificates.path("newer-ca.pem").display().to_string());
    kafka.restart();
    service.wait_for_deliveries(1000.0);
    let what = "mutual TLS: client certificate and key replaced, then the old CA no longer trusted";
    let fault = Fault { name: "certificate rotated", what, exactly_once: false };
    let findings = finish(fault, &mut service, traffic, &kafka, Vec::new());
    assert_eq!((findings.parked, findings.out_of_order), (0, 0));
}

#[test]
fn an_expired_certificate_is_told_and_its_successor_taken() {
    let certificates = Certificates::new();
    certificates.make_ca("ca");
    for (name, days) in [("broker", "30"), ("client", "30"), ("old-broker", "-1"), ("old-client", "-1")] {
        certificates.make_for(name, "ca", days);
    }
    certificates.join("client.now", &["client.pem", "client.key"]);
    let now = certificates.path("client.now");
    let mut kafka = kafka(&certificates, "ca.pem", &[]);
    let forward = format!(
        "[forward.kafka]\n\"security.protocol\" = \"ssl\"\n{}{}{}",
        setting("ssl.ca.location", &certificates.path("ca.pem")),
        setting("ssl.certificate.location", &now),
        setting("ssl.key.location", &now)
    );
    let mut service = Service::start(&kafka.bootstrap_of("SSL"), &forward);
    let traffic = Traffic::start(service.ports(), load());
    service.wait_for_deliveries(1000.0);
    let certificate_of_the_broker = |kafka: &mut Kafka, name: &str| {
        kafka.kill();
        kafka.set_property("ssl.keystore.location", &certificates.path(name).display().to_string());
        kafka.restart();
    };

    certificate_of_the_broker(&mut kafka, "old-broker.both");
    wait_for_refusal(&mut service, &traffic, "certificate verify failed");
    certificate_of_the_broker(&mut kafka, "broker.both");
    service.wait_for_deliveries(1000.0);

    certificates.join("client.now", &["old-client.pem", "old-client.key"]);
    service.wait_for("the new file to be seen", PATIENCE, |service| service.logged("credentials have changed") == 1);
    wait_for_refusal(&mut service, &traffic, "certificate");
    certificates.join("client.now", &["client.pem", "client.key"]);
    service.wait_for_deliveries(1000.0);
    let what = "mutual TLS: the broker's certificate expired and replaced, then the client's";
    let fault = Fault { name: "certificates expired", what, exactly_once: false };
    let findings = finish(fault, &mut service, traffic, &kafka, Vec::new());
    assert_eq!((findings.parked, findings.out_of_order), (0, 0));
}

/// Waits until the status names the error and nothing is delivered any more; collecting goes on.
fn wait_for_refusal(service: &mut Service, traffic: &Traffic, error: &str) {
    service.wait_for("the error to be told", PATIENCE, |service| {
        service.status()["forward"]["last_error"].to_string().contains(error)
    });
    let delivered = service.delivered();
    traffic.flow(service, 500);
    assert_eq!((service.delivered(), service.get("/readyz").0), (delivered, 200));
}

#[test]
fn a_broker_of_another_ca_is_not_trusted() {
    let certificates = Certificates::new();
    certificates.make_ca("ca");
    certificates.make_ca("other-ca");
    certificates.make("broker", "ca");
    certificates.make("client", "ca");
    let kafka = kafka(&certificates, "ca.pem", &[]);
    let ca = certificates.path("trusted.pem");
    fs::copy(certificates.path("other-ca.pem"), &ca).unwrap();
    let forward = format!(
        "[forward.kafka]\n\"security.protocol\" = \"ssl\"\n{}{}{}",
        setting("ssl.ca.location", &ca),
        setting("ssl.certificate.location", &certificates.path("client.pem")),
        setting("ssl.key.location", &certificates.path("client.key"))
    );
    let mut service = Service::start(&kafka.bootstrap_of("SSL"), &forward);
    let traffic = Traffic::start(service.ports(), load());
    service.wait_for("the error to be told", PATIENCE, |service| {
        service.status()["forward"]["last_error"].to_string().contains("certificate verify failed")
    });
    assert_eq!((service.delivered(), service.get("/readyz").0), (0.0, 200));
    fs::copy(certificates.path("ca.pem"), &ca).unwrap();
    service.wait_for_deliveries(1000.0);
    let fault =
        Fault { name: "CA file wrong", what: "the broker's CA not in the file, then it is", exactly_once: false };
    finish(fault, &mut service, traffic, &kafka, Vec::new());
}
